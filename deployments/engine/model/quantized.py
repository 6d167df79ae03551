"""Reads checkpoints whose weights are in FP8: the codes, and the scales beside them.

transformers would want further packages or a GPU for these. Here it loads the codes as the numbers that they are, in
the model's own type, which holds every one of them; they are multiplied with their scales thereafter. So the same
checkpoint is served everywhere, and `layers/fp8.py` notes on which grid each weight lies. What its configuration says,
`fp8_config.py` reads. Called while a model is loaded.
"""

import logging

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.kernels.fp8 import LEAST_SCALE, Scales, dequantize
from deployments.engine.layers.fp8 import note_scales
from deployments.engine.model.fp8_config import Scheme
from deployments.engine.model.headers import weight_files
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_FP8_NAME = "F8_E4M3"  # in the headers of safetensors files
# What may stand beside a weight, and is read or does not matter: scales of KV, which is kept as it is computed.
_SCALES, _OF_KV = ("weight_scale", "weight_scale_inv"), ("k_scale", "v_scale", "q_scale")


def is_scale(name: str) -> bool:
    """Whether a weight's name in a checkpoint is that of a scale."""
    return name.rpartition(".")[2] in _SCALES + _OF_KV


@torch.inference_mode()
def apply_scales(path: str, model: PreTrainedModel, scheme: Scheme) -> frozenset[str]:
    """Multiply weights that were loaded as codes with their scales, in place.

    Args:
        path: folder or hub id.
        model: as loaded.
        scheme: of the checkpoint.

    Returns:
        Names in the checkpoint that are no parameters, and were read here.

    Raises:
        UnsupportedModelError: codes without scales or scales of another shape, or codes that are no linear layer's.
    """
    codes, scales, others = _find(path)
    for name in sorted(codes):
        layer = _layer_of(path, model, name)
        key = next((key for key in (name + _suffix(suffix) for suffix in _SCALES) if key in scales), None)
        if key is None:
            raise UnsupportedModelError(f"model {path!r}: the checkpoint lacks the scale of {name}")
        grid = _grid(path, key, scales[key].to(layer.weight.device), layer.weight.shape, scheme)
        layer.weight.copy_(dequantize(layer.weight, grid, layer.weight.dtype))
        note_scales(layer, grid)
    logger.info("%d weights are in FP8", len(codes))
    return frozenset(scales) | others


def _suffix(suffix: str) -> str:
    return suffix.removeprefix("weight")


def _find(path: str) -> tuple[set[str], dict[str, Tensor], frozenset[str]]:
    """Names of the weights in FP8, scales of weights by their own names, and names of scales that do not matter."""
    codes: set[str] = set()
    scales: dict[str, Tensor] = {}
    others: set[str] = set()
    files = weight_files(path)
    if not files:
        raise UnsupportedModelError(f"model {path!r}: weights in FP8 are read from safetensors files alone")
    for file in files:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118  # no mapping
                last = name.rpartition(".")[2]
                if last in _SCALES:
                    scales[name] = content.get_tensor(name).float()
                elif last in _OF_KV:
                    others.add(name)
                elif content.get_slice(name).get_dtype() == _FP8_NAME:
                    codes.add(name)
    return codes, scales, frozenset(others)


def _layer_of(path: str, model: PreTrainedModel, name: str) -> nn.Linear:
    """The layer that a weight of the checkpoint is of."""
    owner, _, last = name.rpartition(".")
    for prefix in ("", f"{model.base_model_prefix}."):
        try:
            layer = model.get_submodule(prefix + owner)
        except AttributeError:
            continue
        if last == "weight" and isinstance(layer, nn.Linear):
            return layer
    raise UnsupportedModelError(f"model {path!r}: {name} is in FP8, but is no linear layer's weight")


def _grid(path: str, name: str, values: Tensor, shape: torch.Size, scheme: Scheme) -> Scales:
    """Scales as they stand in the checkpoint: for the whole weight, for each row or for each block."""
    num_rows, depth = shape
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise UnsupportedModelError(f"model {path!r}: {name} has scales that are not finite, or less than 0")
    values = values.clamp(min=LEAST_SCALE)
    if values.numel() == 1:
        return Scales(values.view(1, 1), num_rows, depth)
    if values.shape in ((num_rows,), (num_rows, 1)):
        return Scales(values.view(-1, 1), 1, depth)
    if scheme.blocks is not None:
        down, across = scheme.blocks
        if values.shape == (-(-num_rows // down), -(-depth // across)):
            return Scales(values.contiguous(), down, across)
    raise UnsupportedModelError(
        f"model {path!r}: {name} has the shape {list(values.shape)}, which fits no weight of {list(shape)}"
        + (f" in blocks of {list(scheme.blocks)}" if scheme.blocks else "")
    )
