"""Reads checkpoints whose experts are in MXFP4 (gpt-oss): codes of 4 bits, 32 of which share a scale.

Where kernels read them so, they stay as they are: experts of ours take the place of transformers' before weights are
loaded. Else transformers turns them into the model's own type as it reads them, the largest weight at a time. Called
while a model is loaded.
"""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deployments.engine.kernels.mxfp4 import SHARED
from deployments.engine.layers.stored_experts import StoredExperts
from deployments.engine.model.headers import Header, Headers
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_CODES, _SCALES = "_blocks", "_scales"  # what a weight's name ends in
_CODES_PER_BYTE = 2
_STORED = "mxfp4_as_stored"  # how transformers is told to use our experts
_MODEL_TYPE = "gpt_oss"  # whose experts we have
_WEIGHTS = "experts.gate_up_proj", "experts.down_proj"  # what their names end in


@register_quantization_config(_STORED)
class _StoredConfig(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method = _STORED  # type: ignore[assignment]  # those of transformers are an enumeration


@register_quantizer(_STORED)
class _StoredQuantizer(HfQuantizer):
    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        store_experts(model)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def store_experts(model: PreTrainedModel) -> None:
    """Put experts that are stored in MXFP4 in place of those of gpt-oss, before their weights are loaded."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # only where there is such a model

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GptOssExperts):
                setattr(parent, name, StoredExperts(child))


def read_mxfp4(path: str, config: PretrainedConfig, headers: Headers, *, keeps: bool) -> Headers | None:
    """Have weights in MXFP4 kept, or turned into the model's own type as they are read.

    Without this transformers leaves them as they are where its kernels for them are installed, in layers that our
    engine does not run.

    Args:
        path: folder or hub id, for messages.
        config: of the checkpoint; changed.
        headers: of its weights.
        keeps: where kernels read them so. They are turned nevertheless if not all experts are in MXFP4, or in groups of
            other sizes.

    Returns:
        Headers of the weights as numbers; None: it is not in MXFP4.

    Raises:
        UnsupportedModelError: codes without scales, scales without codes, or shapes that do not go together.
    """
    values: Any = getattr(config, "quantization_config", None)
    if not isinstance(values, Mapping) or values.get("quant_method") != "mxfp4":
        return None
    widened = _widened(path, headers)
    if keeps and config.model_type == _MODEL_TYPE and _are_all_stored(headers):
        config.quantization_config = {"quant_method": _STORED}
        logger.info("experts in MXFP4 stay as they are")
    else:
        config.quantization_config = {**values, "dequantize": True}
        logger.info("weights in MXFP4 are turned into the model's own type as they are read")
    return widened


def _are_all_stored(headers: Headers) -> bool:
    """Whether all weights of experts have codes, 32 to a scale."""
    weights = [name for name in headers if name.removesuffix(_CODES).endswith(_WEIGHTS)]
    return all(name.endswith(_CODES) and headers[name].shape[-1] == SHARED // _CODES_PER_BYTE for name in weights)


def _widened(path: str, headers: Headers) -> Headers:
    widened, rest = Headers(), dict(headers)
    for name in headers:
        base = name.removesuffix(_CODES)
        if base == name or not (base + _SCALES in headers or headers[name].is_integer):
            continue
        if base in headers:
            raise UnsupportedModelError(f"model {path!r}: the checkpoint has {base} twice, as codes and as numbers")
        widened[base] = _numbers_of(path, name, rest.pop(name), rest.pop(base + _SCALES, None))
    for name in rest:
        if name.endswith(_SCALES) and rest[name].is_integer:
            raise UnsupportedModelError(f"model {path!r}: the checkpoint lacks the codes of {name}")
    return Headers(widened | rest)


def _numbers_of(path: str, name: str, codes: Header, scales: Header | None) -> Header:
    if scales is None:
        raise UnsupportedModelError(f"model {path!r}: the checkpoint lacks the scales of {name}")
    if {codes.dtype, scales.dtype} != {"U8"}:
        types = f"{codes.dtype} and {scales.dtype}"
        raise UnsupportedModelError(f"model {path!r}: {name} and its scales are {types}, and U8 is read")
    if codes.shape[:-1] != scales.shape or len(codes.shape) != 4:
        shapes = f"{list(codes.shape)} and {list(scales.shape)}"
        raise UnsupportedModelError(f"model {path!r}: {name} and its scales have the shapes {shapes}")
    num_experts, num_columns, num_blocks, num_bytes = codes.shape
    return Header((num_experts, num_blocks * num_bytes * _CODES_PER_BYTE, num_columns), "BF16")
