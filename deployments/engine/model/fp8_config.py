"""What a configuration says of FP8: whether the weights of its checkpoint are of a form that we read.

Knows no files and no weights. Called while a model is loaded.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from deployments.engine.model.bounds import shown
from deployments.engine.model.config import as_one_of
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_METHODS = frozenset({"compressed-tensors", "fp8"})
# Of compressed-tensors, how numbers lie in files: those of these are FP8 if their configuration says so. In all others
# they are packed, or have scales of another kind.
_FORMATS = ("float-quantized", "naive-quantized", "mixed-precision", "dense")
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
    _check_format(values, "format")
    if _mapping(values, "sparsity_config").get("format", "dense") != "dense":
        raise _Unsupported("weights that are sparse")
    if _mapping(values, "transform_config").get("config_groups"):
        raise _Unsupported("weights that are transformed (transform_config)")
    blocks = {_read_group(_name(name), group) for name, group in groups.items()} - {None}
    if len(blocks) > 1:
        raise _Unsupported(f"blocks of several sizes, {sorted(block for block in blocks if block)}")
    return Scheme(blocks.pop() if blocks else None)


def _name(value: object) -> str:
    """A word of a configuration in a message; what is none is quoted, and cut where it is long."""
    return value if isinstance(value, str) and len(value) <= 80 and value.isidentifier() else shown(value)


def _kind(value: object) -> str:
    return _KINDS.get(str(value)) or _name(value)


def _mapping(values: Mapping[str, Any], name: str, path: str = "") -> Mapping[str, Any]:
    """A field that is an object, or is not there."""
    value = values.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _Unsupported(f"{path}{name} is {shown(value)}: must be an object")
    return value


def _check_format(values: Mapping[str, Any], path: str) -> None:
    if (value := values.get("format")) is not None and value not in _FORMATS:
        raise _Unsupported(f"{path} is {shown(value)}; {', '.join(_FORMATS)} are read")


def _read_group(name: str, group: Mapping[str, Any]) -> tuple[int, int] | None:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise _Unsupported(f"{name} has no weights")
    _check_format(group, f"{name}.format")
    bits, kind, strategy = (weights.get(field) for field in ("num_bits", "type", "strategy"))
    if (bits, kind) != (8, "float"):
        raise _Unsupported(f"{name} has weights of {shown(bits)} bits, {_kind(kind)}; FP8 alone is read")
    if weights.get("symmetric") is False:
        raise _Unsupported(f"{name} has weights with zero points")
    if strategy not in ("tensor", "channel", "block"):
        raise _Unsupported(f"{name} has scales by {_name(strategy)}; by tensor, channel and block are read")
    if group.get("input_activations") is not None:
        _check_inputs(name, _mapping(group, "input_activations", f"{name}."))
    if group.get("output_activations") is not None:
        raise _Unsupported(f"{name} quantizes outputs")
    return _block_of(weights, "block_structure", f"{name}.weights.") if strategy == "block" else None


def _check_inputs(name: str, inputs: Mapping[str, Any]) -> None:
    bits, kind = inputs.get("num_bits"), inputs.get("type")
    if (bits, kind) != (8, "float"):
        raise _Unsupported(f"{name} has inputs of {shown(bits)} bits, {_kind(kind)}; FP8 alone is computed")
    if inputs.get("dynamic") is not True:
        raise _Unsupported(
            f"{name} has inputs with scales of the checkpoint (static); those found at run time are used"
        )


def _read_fine_grained(values: Mapping[str, Any]) -> Scheme:
    if values.get("fmt", "e4m3") != "e4m3":
        raise _Unsupported(f"numbers of the form {shown(values['fmt'])}; e4m3 alone is read")
    if values.get("expert_dtype", "fp8") != "fp8":
        raise _Unsupported(f"experts in {shown(values['expert_dtype'])}")
    if (inputs := values.get("activation_scheme", "dynamic")) != "dynamic":
        raise _Unsupported(f"inputs with scales of the checkpoint ({_name(inputs)}); those found at run time are used")
    return Scheme(None if values.get("weight_block_size") is None else _block_of(values, "weight_block_size"))


def _block_of(values: Mapping[str, Any], name: str, path: str = "") -> tuple[int, int]:
    """Rows and columns of a block; of `128x128` too."""
    value = values.get(name)
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2:
        down, across = (as_one_of(size, frozenset({int})) for size in sizes)
        if type(down) is int and type(across) is int and min(down, across) > 0:
            return down, across
    raise _Unsupported(f"{path}{name} is {shown(value)}: must be two whole numbers greater than 0")
