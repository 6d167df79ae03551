"""Reads checkpoints whose experts are in MXFP4 (gpt-oss): codes of 4 bits, 32 of which share a scale.

transformers turns them into the model's own type as it reads them, the largest weight at a time. Called while a model
is loaded.
"""

import logging
from collections.abc import Mapping

from transformers import PretrainedConfig

from deployments.engine.model.headers import Header, Headers
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_CODES, _SCALES = "_blocks", "_scales"  # what a weight's name ends in
_CODES_PER_BYTE = 2


def widen_mxfp4(path: str, config: PretrainedConfig, headers: Headers) -> Headers | None:
    """Have weights in MXFP4 turned into the model's own type as they are read.

    Without this transformers leaves them as they are where its kernels for them are installed, in layers that our
    engine does not run.

    Args:
        path: folder or hub id, for messages.
        config: of the checkpoint; changed.
        headers: of its weights.

    Returns:
        Headers of the weights as they will be; None: it is not in MXFP4.

    Raises:
        UnsupportedModelError: codes without scales, scales without codes, or shapes that do not go together.
    """
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, Mapping) or values.get("quant_method") != "mxfp4":
        return None
    config.quantization_config = {**values, "dequantize": True}
    logger.info("weights in MXFP4 are turned into the model's own type as they are read")
    return _widened(path, headers)


def _widened(path: str, headers: Headers) -> Headers:
    widened, rest = Headers(), dict(headers)
    for name in headers:
        base = name.removesuffix(_CODES)
        if base == name or not headers[name].is_integer:
            continue
        codes, scales = rest.pop(name), rest.pop(base + _SCALES, None)
        if scales is None:
            raise UnsupportedModelError(f"model {path!r}: the checkpoint lacks the scales of {name}")
        if codes.shape[:-1] != scales.shape or len(codes.shape) != 4:
            shapes = f"{list(codes.shape)} and {list(scales.shape)}"
            raise UnsupportedModelError(f"model {path!r}: {name} and its scales have the shapes {shapes}")
        num_experts, num_columns, num_blocks, num_bytes = codes.shape
        widened[base] = Header((num_experts, num_blocks * num_bytes * _CODES_PER_BYTE, num_columns), is_integer=False)
    for name in rest:
        if name.endswith(_SCALES) and rest[name].is_integer:
            raise UnsupportedModelError(f"model {path!r}: the checkpoint lacks the codes of {name}")
    return Headers(widened | rest)
