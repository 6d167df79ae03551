"""Loads weights, all of them or none: a model with some of its parameters drawn at random answers nonsense.

transformers only warns of parameters that a checkpoint lacks, and of weights that it has no place for. Called while a
model is loaded, and while a GGUF file is converted.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deployments.engine.model.config import blamed, build_empty, read_values
from deployments.engine.model.quantized import apply_scales, take_scheme
from deployments.errors import UnsupportedModelError, brief

logger = logging.getLogger(__name__)

_MAX_NAMES = 5
# What old checkpoints saved beside their weights: buffers that a model computes for itself.
_BUFFERS = re.compile(r"\.(inv_freq|masked_bias|position_ids|(attn|attention)\.bias)$")


def load_weights(path: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Load a checkpoint; one in FP8 with the numbers that its codes stand for.

    Args:
        path: folder or hub id.
        config: its configuration; what is said there of FP8 is taken out.
        options: for transformers' `from_pretrained`.

    Raises:
        UnsupportedModelError: a parameter is missing or has another shape, or the checkpoint has a layer, a bias or
            the like that its configuration does not: names them. Or it is quantized in a way that is not read.
    """
    scheme = take_scheme(path, config)
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
        found["unexpected_keys"] = set(found["unexpected_keys"]) - apply_scales(path, model, scheme)
    check_complete(path, model, found)
    return cast(PreTrainedModel, model)


def check_complete(path: str, model: nn.Module, found: dict[str, Any]) -> None:
    """Refuse a model that is not what its checkpoint holds.

    Args:
        path: for the message.
        model: as loaded.
        found: the loading info of transformers.

    Raises:
        UnsupportedModelError: see `load_weights`.
    """
    faults = []
    if missing := sorted(found["missing_keys"]):
        faults.append(f"the checkpoint lacks {_listed(missing)}")
    if mismatched := sorted(found["mismatched_keys"]):
        shapes = (f"{name} ({list(has)}, config.json wants {list(wants)})" for name, has, wants in mismatched)
        faults.append(f"other shapes than config.json says: {_listed(shapes)}")
    unexpected = sorted(found["unexpected_keys"])
    if extra := [name for name in unexpected if _belongs_to(model, name)]:
        faults.append(f"the checkpoint has weights that config.json has no place for: {_listed(extra)}")
    if errors := found.get("error_msgs"):
        faults.append(_listed(" ".join(str(error).split()) for error in errors))
    if faults:
        raise UnsupportedModelError(f"model {path!r}: {'; '.join(faults)}")
    if unexpected:
        logger.info("not part of the language model, left out: %s", _listed(unexpected))


def _belongs_to(model: nn.Module, name: str) -> bool:
    """Whether a weight is of the model itself, and not of something beside it, such as a value head."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    parts = {part for owner in (model, base) for part, _ in owner.named_children()}
    return name.partition(".")[0] in parts and _BUFFERS.search(name) is None


def _explained(path: str, config: PretrainedConfig, error: Exception) -> UnsupportedModelError:
    try:
        build_empty(config.to_dict())
    except Exception as fault:  # not the weights: the configuration makes no model
        values = read_values(path)  # by the names that the file has, not those that the class gave them
        return blamed(path, values, build_empty, fault)
    return UnsupportedModelError(f"model {path!r}: {brief(error)}")


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _MAX_NAMES} more" if len(every) > _MAX_NAMES else ""
    return ", ".join(every[:_MAX_NAMES]) + more
