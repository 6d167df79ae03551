"""Reads checkpoints whose weights are in FP8: the codes, and the scales beside them.

transformers would want further packages or a GPU for these. Here it loads the codes as the numbers that they are, in
the model's own type, which holds every one of them; they are multiplied with their scales thereafter. So the same
checkpoint is served everywhere, and `layers/fp8.py` notes on which grid each weight lies. What its configuration says,
`fp8_config.py` reads. Called while a model is loaded.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.kernels.fp8 import LEAST_SCALE, Scales, dequantize
from deployments.engine.layers.fp8 import note_scales
from deployments.engine.model.fp8_config import Scheme
from deployments.engine.model.headers import Header, weight_files
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Types, as headers of safetensors files have them: of codes that are read, of any codes, and of scales that are numbers
# as they are. Whole numbers may be exponents, one or several of them, and nothing says which.
_CODES, _ANY_CODES = "F8_E4M3", re.compile(r"F[468](_|$)")
_NUMBERS = ("BF16", "F16", "F32", "F64", "F8_E8M0")
# What may stand beside a weight, and is read or does not matter: scales of KV, which is kept as it is computed.
_WEIGHT, _SCALES, _OF_KV = "weight", ("weight_scale", "weight_scale_inv"), ("k_scale", "v_scale", "q_scale")


def is_scale(name: str) -> bool:
    """Whether a weight's name in a checkpoint is that of a scale."""
    return name.rpartition(".")[2] in _SCALES + _OF_KV


def is_code(header: Header) -> bool:
    """Whether a weight in a checkpoint is in FP8 that is read."""
    return header.dtype == _CODES


def check_files(path: str) -> None:
    """Refuse a checkpoint without safetensors files: scales are read from no others.

    Raises:
        UnsupportedModelError: it has none.
    """
    if not weight_files(path):
        raise UnsupportedModelError("weights in FP8 are read from safetensors files alone")


def check_codes(model: PreTrainedModel, headers: Mapping[str, Header], scheme: Scheme) -> None:
    """Refuse codes that `apply_scales` could not multiply with the scales of the checkpoint, before either is read.

    Args:
        model: of the checkpoint; its weights are not looked at.
        headers: of the checkpoint's weights.
        scheme: of the checkpoint.

    Raises:
        UnsupportedModelError: codes without scales, scales without codes or of another shape, either of a type that is
            not read, or codes that are no linear layer's: names them.
    """
    scales = _scales_by_weight(headers)
    for name in sorted(name for name in headers if name in scales or _ANY_CODES.match(headers[name].dtype)):
        if not is_scale(name):
            _check_types(name, headers, scales.get(name))
            _layer_of(model, name)
            _check_shapes(name, headers, scales.get(name), scheme)


def _scales_by_weight(headers: Mapping[str, Header]) -> dict[str, str]:
    """Names of scales by those of the weights that they are of."""
    found: dict[str, str] = {}
    for name in sorted(headers):
        last = name.rpartition(".")[2]
        if last not in _SCALES:
            continue
        weight = name.removesuffix(last) + _WEIGHT
        if weight not in headers:
            raise UnsupportedModelError(f"the checkpoint lacks the codes of {name}")
        if weight in found:
            raise UnsupportedModelError(f"{weight} has two scales, {found[weight]} and {name}")
        found[weight] = name
    return found


def _check_types(name: str, headers: Mapping[str, Header], scale: str | None) -> None:
    if (found := headers[name].dtype) != _CODES:
        beside = "" if scale is None else f", with {scale} beside it"
        raise UnsupportedModelError(f"{name} is {found}{beside}, and {_CODES} is read")
    if scale is not None and (found := headers[scale].dtype) not in _NUMBERS:
        raise UnsupportedModelError(f"{scale} is {found}, and {', '.join(_NUMBERS)} are read")


def _layer_of(model: PreTrainedModel, name: str) -> nn.Linear:
    """The layer that a weight of the checkpoint is of."""
    owner, _, last = name.rpartition(".")
    for prefix in ("", f"{model.base_model_prefix}."):
        try:
            layer = model.get_submodule(prefix + owner)
        except AttributeError:
            continue
        if last == _WEIGHT and isinstance(layer, nn.Linear):
            return layer
    if ".experts." in name:
        raise UnsupportedModelError(f"{name} is in FP8: experts are served in bfloat16 and in MXFP4, not in FP8")
    raise UnsupportedModelError(f"{name} is in FP8, but is no linear layer's weight")


def _check_shapes(name: str, headers: Mapping[str, Header], scale: str | None, scheme: Scheme) -> None:
    if scale is None:
        raise UnsupportedModelError(f"the checkpoint lacks the scale of {name}")
    shape, weight = headers[scale].shape, headers[name].shape
    if _tile(shape, weight, scheme) is None:
        in_blocks = f" in blocks of {list(scheme.blocks)}" if scheme.blocks else ""
        raise UnsupportedModelError(
            f"{scale} has the shape {list(shape)}, which fits no weight of {list(weight)}{in_blocks}"
        )


def _tile(shape: Sequence[int], weight: Sequence[int], scheme: Scheme) -> tuple[int, int] | None:
    """Rows and columns of what has one scale: the whole weight, a row or a block; None: of no such shape."""
    if len(weight) != 2:
        return None
    num_rows, depth = weight
    if math.prod(shape) == 1:
        return num_rows, depth
    if tuple(shape) in ((num_rows,), (num_rows, 1)):
        return 1, depth
    if scheme.blocks is not None and tuple(shape) == _num_tiles(weight, scheme.blocks):
        return scheme.blocks
    return None


def _num_tiles(weight: Sequence[int], tile: Sequence[int]) -> tuple[int, int]:
    down, across = (-(-size // side) for size, side in zip(weight, tile, strict=True))
    return down, across


@torch.inference_mode()
def apply_scales(path: str, model: PreTrainedModel, headers: Mapping[str, Header], scheme: Scheme) -> frozenset[str]:
    """Multiply weights that were loaded as codes with their scales, in place.

    Args:
        path: folder or hub id.
        model: as loaded.
        headers: of the checkpoint's weights, which `check_codes` has seen.
        scheme: of the checkpoint.

    Returns:
        Names in the checkpoint that are no parameters, and were read here or do not matter.

    Raises:
        UnsupportedModelError: scales that are not finite, or less than 0.
    """
    scales = _read_scales(path)
    pairs = _scales_by_weight(headers)
    for name, scale in pairs.items():
        layer = _layer_of(model, name)
        grid = _grid(scale, scales[scale].to(layer.weight.device), layer.weight.shape, scheme)
        layer.weight.copy_(dequantize(layer.weight, grid, layer.weight.dtype))
        note_scales(layer, grid)
    logger.info("%d weights are in FP8", len(pairs))
    return frozenset(filter(is_scale, headers))


def _read_scales(path: str) -> dict[str, Tensor]:
    """Scales of weights by their own names."""
    scales: dict[str, Tensor] = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as content:
            names = [name for name in content.keys() if name.rpartition(".")[2] in _SCALES]  # noqa: SIM118  # no mapping
            scales |= {name: content.get_tensor(name).float() for name in names}
    return scales


def _grid(name: str, values: Tensor, shape: torch.Size, scheme: Scheme) -> Scales:
    """Scales as they stand in the checkpoint: for the whole weight, for each row or for each block."""
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise UnsupportedModelError(f"{name} has scales that are not finite, or less than 0")
    tile = _tile(values.shape, shape, scheme)
    assert tile is not None, (name, values.shape, shape)
    return Scales(values.clamp(min=LEAST_SCALE).reshape(_num_tiles(shape, tile)), *tile)
