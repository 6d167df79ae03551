"""Reads checkpoints whose weights are in FP8: what their configuration says, and the scales beside the weights.

transformers would want further packages or a GPU for these. Here it loads the codes as the numbers that they are, in
the model's own type, which holds every one of them; they are multiplied with their scales thereafter. So the same
checkpoint is served everywhere, and `layers/fp8.py` notes on which grid each weight lies. Called while a model is
loaded.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deployments.engine.kernels.fp8 import LEAST_SCALE, Scales, dequantize
from deployments.engine.layers.fp8 import note_scales
from deployments.engine.model.headers import weight_files
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_METHODS = frozenset({"compressed-tensors", "fp8"})
_FP8_NAME = "F8_E4M3"  # in the headers of safetensors files
# What may stand beside a weight, and is read or does not matter: scales of KV, which is kept as it is computed.
_SCALES, _OF_KV = ("weight_scale", "weight_scale_inv"), ("k_scale", "v_scale", "q_scale")
_KINDS = {"int": "integers", "float": "floating point"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a checkpoint are quantized.

    Attributes:
        blocks: rows and columns of what has one scale, where that is neither a row nor the whole weight.
    """

    blocks: tuple[int, int] | None


def take_scheme(path: str, config: PretrainedConfig) -> Scheme | None:
    """Take the quantization that we read ourselves out of a configuration, so that transformers does not.

    Args:
        path: of the checkpoint, for messages.
        config: changed.

    Returns:
        None: it is not quantized, or in a way that transformers reads.

    Raises:
        UnsupportedModelError: FP8 of another kind, or other than FP8 in compressed-tensors' form: names it.
    """
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, Mapping) or values.get("quant_method") not in _METHODS:
        return None
    read = _read_compressed if values["quant_method"] == "compressed-tensors" else _read_fine_grained
    try:
        scheme = read(values)
    except _Unsupported as fault:
        raise UnsupportedModelError(f"model {path!r}: config.json: quantization_config: {fault}") from None
    if values.get("kv_cache_scheme") is not None:
        logger.info("the checkpoint has scales for KV, which is kept as it is computed")
    del config.quantization_config
    if config.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        config.dtype = torch.bfloat16
    return scheme


class _Unsupported(Exception):
    """What of a configuration is not supported."""


def _read_compressed(values: Mapping[str, Any]) -> Scheme:
    groups = values.get("config_groups")
    if (
        not isinstance(groups, Mapping)
        or not groups
        or not all(isinstance(group, Mapping) for group in groups.values())
    ):
        raise _Unsupported("no config_groups")
    if (values.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _Unsupported("weights that are sparse")
    if (values.get("transform_config") or {}).get("config_groups"):
        raise _Unsupported("weights that are transformed (transform_config)")
    blocks = {_read_group(str(name), group) for name, group in groups.items()} - {None}
    if len(blocks) > 1:
        raise _Unsupported(f"blocks of several sizes, {sorted(block for block in blocks if block)}")
    return Scheme(blocks.pop() if blocks else None)


def _read_group(name: str, group: Mapping[str, Any]) -> tuple[int, int] | None:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise _Unsupported(f"{name} has no weights")
    bits, kind, strategy = (weights.get(field) for field in ("num_bits", "type", "strategy"))
    if (bits, kind) != (8, "float"):
        raise _Unsupported(f"{name} has weights of {bits} bits, {_KINDS.get(str(kind), kind)}; FP8 alone is read")
    if weights.get("symmetric") is False:
        raise _Unsupported(f"{name} has weights with zero points")
    if strategy not in ("tensor", "channel", "block"):
        raise _Unsupported(f"{name} has scales by {strategy}; by tensor, channel and block are read")
    inputs = group.get("input_activations")
    if inputs is not None:
        _check_inputs(name, inputs)
    if group.get("output_activations") is not None:
        raise _Unsupported(f"{name} quantizes outputs")
    return _block_of(weights.get("block_structure")) if strategy == "block" else None


def _check_inputs(name: str, inputs: Mapping[str, Any]) -> None:
    bits, kind = inputs.get("num_bits"), inputs.get("type")
    if (bits, kind) != (8, "float"):
        raise _Unsupported(f"{name} has inputs of {bits} bits, {_KINDS.get(str(kind), kind)}; FP8 alone is computed")
    if inputs.get("dynamic") is not True:
        raise _Unsupported(
            f"{name} has inputs with scales of the checkpoint (static); those found at run time are used"
        )


def _read_fine_grained(values: Mapping[str, Any]) -> Scheme:
    if values.get("fmt", "e4m3") != "e4m3":
        raise _Unsupported(f"numbers of the form {values['fmt']!r}; e4m3 alone is read")
    if values.get("expert_dtype", "fp8") != "fp8":
        raise _Unsupported(f"experts in {values['expert_dtype']!r}")
    if (inputs := values.get("activation_scheme", "dynamic")) != "dynamic":
        raise _Unsupported(f"inputs with scales of the checkpoint ({inputs}); those found at run time are used")
    size = values.get("weight_block_size")
    return Scheme(None if size is None else _block_of(size))


def _block_of(value: Any) -> tuple[int, int]:
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        down, across = (int(size) for size in sizes)
    except (TypeError, ValueError):
        raise _Unsupported(f"blocks of {value!r}") from None
    if min(down, across) < 1:
        raise _Unsupported(f"blocks of {value!r}")
    return down, across


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
