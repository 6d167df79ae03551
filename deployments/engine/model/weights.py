"""Loads weights, all of them or none: a model with some of its parameters drawn at random answers nonsense.

transformers only warns of parameters that a checkpoint lacks, and of weights that it has no place for. Called while a
model is loaded, and while a GGUF file is converted.
"""

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from deployments.engine.attention.base import IMPLEMENTATION
from deployments.engine.layers.fp8 import check_quantizable
from deployments.engine.layers.stored_experts import StoredExperts
from deployments.engine.model.config import blamed, build_empty, read_values
from deployments.engine.model.fp8_config import Scheme, take_scheme
from deployments.engine.model.headers import Header, Headers
from deployments.engine.model.mxfp4 import read_mxfp4
from deployments.engine.model.quantized import apply_scales, check_codes, check_files, is_code, is_scale
from deployments.errors import UnsupportedModelError, brief

logger = logging.getLogger(__name__)

_MAX_NAMES = 5
# What old checkpoints saved beside their weights: buffers that a model computes for itself.
_BUFFERS = re.compile(r"\.(inv_freq|masked_bias|position_ids|(attn|attention)\.bias)$")
# Elements, beside those of the weights, of what a model computes for itself: positions times sizes of heads.
_MAX_TABLE = 2**28
_SIZE = re.compile(r"size|dim|num_|n_|experts|heads")


def load_weights(
    path: str,
    config: PretrainedConfig,
    headers: Headers,
    *,
    keeps_mxfp4: bool = False,
    to_fp8: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a checkpoint; one in FP8 with the numbers that its codes stand for.

    Args:
        path: folder or hub id.
        config: its configuration; what is said there of FP8 is taken out.
        headers: of its weights.
        keeps_mxfp4: experts in MXFP4 stay as they are.
        to_fp8: weights are to be rounded to FP8 by the caller; a model of which they cannot is refused.
        options: for transformers' `from_pretrained`.

    Raises:
        UnsupportedModelError: a parameter is missing or has another shape, or the checkpoint has a layer, a bias or
            the like that its configuration does not: names them. Or it is quantized in a way that is not read, or holds
            what is not finite.
    """
    scheme, _ = check_weights(path, config, headers, keeps_mxfp4=keeps_mxfp4, to_fp8=to_fp8, **options)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            trust_remote_code=False,
            # Mismatches are told like whatever else is wrong, all at once, and below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise _explained(path, config, error) from error
    model, found = loaded
    if scheme is not None:
        found["unexpected_keys"] = set(found["unexpected_keys"]) - apply_scales(path, model, headers, scheme)
    check_complete(path, model, found, headers)
    check_finite(path, model)
    return cast(PreTrainedModel, model)


def check_weights(
    path: str,
    config: PretrainedConfig,
    headers: Headers,
    *,
    keeps_mxfp4: bool = False,
    to_fp8: bool = False,
    **options: Any,
) -> tuple[Scheme | None, PreTrainedModel | None]:
    """Refuse what `load_weights` would, as far as names, shapes and types tell; all but weights that are not finite.

    Args:
        path: folder or hub id.
        config: as for `load_weights`.
        headers: of its weights.
        keeps_mxfp4: as for `load_weights`.
        to_fp8: likewise.
        options: as for loading.

    Returns:
        How it is quantized in FP8, if it is, and the model without numbers, where headers tell enough.

    Raises:
        UnsupportedModelError: see `load_weights`.
    """
    scheme = take_scheme(path, config)
    if scheme is not None:
        check_files(path)
    widened = read_mxfp4(path, config, headers, keeps=keeps_mxfp4)
    if not headers or (widened is None and getattr(config, "quantization_config", None) is not None):
        return scheme, None
    model = rehearse(path, config, widened or headers, scheme, **options)
    if to_fp8 and not any(map(is_code, headers.values())):
        check_quantizable(model)
    return scheme, model


@torch.inference_mode()
def rehearse(
    path: str, config: PretrainedConfig, headers: Headers, scheme: Scheme | None, **options: Any
) -> PreTrainedModel:
    """Load everything but the numbers, within milliseconds and without memory, and refuse what would not be whole.

    Args:
        path: for the message.
        config: as loading takes it.
        headers: of the checkpoint's weights.
        scheme: of weights in FP8, whose scales are read by themselves; None: they are not.
        options: as for loading.

    Returns:
        The model, without numbers.

    Raises:
        UnsupportedModelError: see `check_complete` and `check_codes`; or a weight is of whole numbers.
    """
    weights = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    if scheme is not None:
        weights = {name: weight for name, weight in weights.items() if not is_scale(name)}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)  # the weights are as they will be
    try:
        model, found = model_class.from_pretrained(
            None,
            config=plain,
            state_dict=weights,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options | {"device_map": {"": "meta"}, "dtype": torch.float32},
        )
    except Exception as error:
        raise _explained(path, config, error) from error
    if scheme is not None:
        check_codes(model, headers, scheme)
    check_complete(path, model, found, headers)
    whole = {name for name in weights if headers[name].is_integer} - set(found["unexpected_keys"])
    of_buffers = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    if integers := sorted(whole - of_buffers):
        lacks = ", and no quantization_config in config.json" if scheme is None else ""
        raise UnsupportedModelError(f"model {path!r}: weights of whole numbers{lacks}: {_listed(integers)}")
    for name, buffer in model.named_buffers():
        if buffer.numel() > _MAX_TABLE + headers.num_elements:
            raise UnsupportedModelError(f"model {path!r}: config.json wants a table {name} of {list(buffer.shape)}")
    return cast(PreTrainedModel, model)


@torch.inference_mode()
def check_finite(path: str, model: nn.Module) -> None:
    """Refuse weights that make every answer nonsense.

    Raises:
        UnsupportedModelError: names them.
    """
    weights = ((name, weight) for name, weight in model.state_dict().items() if weight.is_floating_point())
    faulty = [name for name, weight in weights if weight.itemsize > 1 and not _is_finite(weight)]
    stored = (module for module in model.named_modules() if isinstance(module[1], StoredExperts))
    faulty += [f"{name}.{scales}" for name, experts in stored for scales in experts.not_finite]
    if faulty:
        dtype = str(model.state_dict()[faulty[0]].dtype).removeprefix("torch.")
        raise UnsupportedModelError(f"model {path!r}: weights that are not finite as {dtype}: {_listed(faulty)}")


def _is_finite(weight: Tensor) -> bool:
    """Without another tensor of its size."""
    return weight.numel() == 0 or all(bool(end.isfinite()) for end in weight.aminmax())


def check_complete(path: str, model: nn.Module, found: dict[str, Any], headers: Mapping[str, Header]) -> None:
    """Refuse a model that is not what its checkpoint holds.

    Args:
        path: for the message.
        model: as loaded.
        found: the loading info of transformers.
        headers: of the weights; they say in which files these are, where that is known.

    Raises:
        UnsupportedModelError: see `load_weights`.
    """
    faults = []
    if missing := sorted(found["missing_keys"]):
        faults.append(f"the checkpoint lacks {_listed(missing)}")
    if mismatched := sorted(found["mismatched_keys"]):
        shapes = (
            f"{name} ({list(has)}{_file_of(name, headers)}, config.json wants {list(wants)})"
            for name, has, wants in mismatched
        )
        sizes = _sizes_of(mismatched, getattr(model, "config", None))
        faults.append(f"other shapes than config.json says{sizes}: {_listed(shapes)}")
    unexpected = sorted(found["unexpected_keys"])
    if extra := [name for name in unexpected if _belongs_to(model, name)]:
        faults.append(f"the checkpoint has weights that config.json has no place for: {_listed(extra)}")
    if errors := found.get("error_msgs"):
        faults.append(_listed(" ".join(str(error).split()) for error in errors))
    if faults:
        raise UnsupportedModelError(f"model {path!r}: {'; '.join(faults)}")
    if unexpected:
        logger.info("not part of the language model, left out: %s", _listed(unexpected))


def _file_of(name: str, headers: Mapping[str, Header]) -> str:
    """Where a weight is; nothing of one that is made of several, or has another name there."""
    return f" in {headers[name].file}" if name in headers and headers[name].file else ""


def _sizes_of(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], config: PretrainedConfig | None) -> str:
    """Fields of a configuration that say what the weights' shapes do not."""
    sides = {want for _, has, wants in mismatched for had, want in zip_longest(has, wants) if had != want}
    values = {} if config is None else config.to_dict()
    sizes = {name: value for name, value in values.items() if type(value) is int and _SIZE.search(name)}
    of_heads = {name for name, value in sizes.items() if "heads" in name and value * sizes.get("head_dim", 0) in sides}
    named = {name for name, value in sizes.items() if value in sides} | of_heads | ({"head_dim"} if of_heads else set())
    return f" ({', '.join(f'{name} is {sizes[name]}' for name in sizes if name in named)})" if named else ""


def _belongs_to(model: nn.Module, name: str) -> bool:
    """Whether a weight is of the model itself, and not of something beside it, such as a value head."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    parts = {part for owner in (model, base) for part, _ in owner.named_children()}
    return name.partition(".")[0] in parts and _BUFFERS.search(name) is None


def _explained(path: str, config: PretrainedConfig, error: Exception) -> UnsupportedModelError:
    if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):
        own = f"{config.model_type} takes its attention from a table of its own, where paged attention has no place"
        return UnsupportedModelError(f"model {path!r}: {own}")
    try:
        build_empty(config.to_dict())
    except Exception as fault:  # not the weights: the configuration makes no model
        values = read_values(path)  # by the names that the file has, not those that the class gave them
        return blamed(path, values, build_empty, fault)
    return UnsupportedModelError(f"model {path!r}: {brief(error)}")


def _listed(names: Iterable[str]) -> str:
    """In one line, whatever the names hold."""
    every = [name if name.isprintable() else repr(name) for name in names]
    more = f" and {len(every) - _MAX_NAMES} more" if len(every) > _MAX_NAMES else ""
    return ", ".join(every[:_MAX_NAMES]) + more
