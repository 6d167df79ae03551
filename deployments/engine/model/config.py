"""Reads a model's `config.json`: forgives what has one meaning only, and refuses the rest by the name of the field.

Checkpoints are written by many programs, some of them careless: a float where the class wants an int, numbers in
quotes. Knows transformers' configuration classes and no weights. Called while a model is loaded.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer

from deployments.engine.model.bounds import ROPE_FIELDS, faults, shown
from deployments.engine.model.files import local_path, read_json
from deployments.errors import UnsupportedModelError, brief

logger = logging.getLogger(__name__)

# Numbers that transformers calculates with, and does not check.
_ROPE_FLOATS = ("rope_theta", "partial_rotary_factor")
_WINDOW = "sliding_window"
_FLOAT = "__float__"
# transformers alone reads the last one; all others it reads with packages that the project does not have.
_SERVED_QUANTIZATIONS = frozenset({"fp8", "compressed-tensors", "mxfp4", "bitnet"})
_ROPE_INTS = frozenset({"original_max_position_embeddings"})
_ROPE_WORDS = frozenset({"rope_type", "type"})
# Of other tasks, and of how answers are given back, which is the engine's to say. A million labels are a million names.
_MEANINGLESS = ("num_labels", "id2label", "label2id", "problem_type", "return_dict", "output_hidden_states")
_OF_MINISTRAL = {"MistralForCausalLM": "MinistralForCausalLM", "MistralModel": "MinistralModel"}
# Of a config.json; transformers' own have some 60.
_MOST_FIELDS = 300


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a checkpoint.

    Args:
        path: folder or hub id.

    Raises:
        UnsupportedModelError: see `read_values`.
    """
    values = read_values(path)
    try:
        return build_config(values)
    except Exception as error:
        raise blamed(path, values, build_config, error) from error


def read_values(path: str) -> dict[str, Any]:
    """What `config.json` says, repaired and checked.

    Args:
        path: folder or hub id.

    Raises:
        UnsupportedModelError: there is none, transformers does not know the model, or names the field that is wrong.
    """
    try:
        if (folder := local_path(path)) is not None:
            values = read_json(path, folder / "config.json")
        else:
            values, _ = PretrainedConfig.get_config_dict(path)
    except OSError as error:
        raise UnsupportedModelError(f"model {path!r}: {brief(error)}") from error
    values = _by_kind_of_layer(values)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"model {path!r}: {_unknown(values)}")
    config_class = CONFIG_MAPPING[model_type]
    try:
        repaired = repair(_with_floats(values), config_class)
        fault = next(_faults(repaired, config_class), None)
    except RecursionError:
        raise UnsupportedModelError(f"model {path!r}: config.json is nested too deeply") from None
    if fault is not None:
        raise UnsupportedModelError(f"model {path!r}: config.json: {fault}")
    return repaired


def _by_kind_of_layer(values: dict[str, Any]) -> dict[str, Any]:
    """A Mistral that says which layers have its window is a Ministral: so do transformers' `AutoConfig` and Mistral."""
    if values.get("model_type") != "mistral" or "layer_types" not in values:
        return values
    renamed = values | {"model_type": "ministral"}
    if isinstance(named := values.get("architectures"), list):
        renamed["architectures"] = [_OF_MINISTRAL.get(name, name) if isinstance(name, str) else name for name in named]
    return renamed


def build_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """Of the class that `model_type` names; leaves `values` as they are."""
    config: PretrainedConfig = CONFIG_MAPPING[values["model_type"]].from_dict(_copied(values))
    return config


def build_empty(values: Mapping[str, Any]) -> None:
    """Build the model without weights, as loading it would."""
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(build_config(values), trust_remote_code=False)


def blamed(
    path: str, values: Mapping[str, Any], attempt: Callable[[Mapping[str, Any]], object], error: Exception
) -> UnsupportedModelError:
    """An error that names the fields without which the attempt succeeds; all of it, if there are none.

    Each attempt takes as long as there are fields, so where a file has more than any model's they are not looked for.
    """
    tried = values if len(values) <= _MOST_FIELDS else ()
    guilty = [name for name in tried if name != "model_type" and _succeeds(attempt, values, name)]
    fields_shown = ", ".join(f"{name} is {shown(values[name])}" for name in guilty)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    where = f"config.json: {fields_shown}: " if guilty else "config.json: "
    return UnsupportedModelError(f"model {path!r}: {where}{reason}")


def repair(values: Mapping[str, Any], config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Give values the types that the class asks for, where they mean the same: 2.0 for 2, 1 for 1.0, "2" for 2."""
    repaired: dict[str, Any] = _copied({name: value for name, value in values.items() if name not in _MEANINGLESS})
    for field in fields(config_class):
        if field.name in repaired:
            repaired[field.name] = as_one_of(repaired[field.name], _kinds(field.type))
    for name in _ROPE_FLOATS:
        if name in repaired:
            repaired[name] = as_one_of(repaired[name], frozenset({float}))
    if _WINDOW in repaired:  # also of a class that has none, for some checkpoints say so by null
        repaired[_WINDOW] = as_one_of(repaired[_WINDOW], frozenset({int}))
    for name in ROPE_FIELDS:
        if isinstance(repaired.get(name), dict):
            repaired[name] = _repair_rope(repaired[name])
    for name, value in repaired.items():
        if value != values[name] or type(value) is not type(values[name]):
            logger.info("config.json: taking %s for %s", shown(values[name]), shown(value))
    return repaired


def as_one_of(value: Any, kinds: frozenset[type]) -> Any:
    """The value as one of these types, if it is one of them but for its spelling; else as it is."""
    if type(value) in kinds:
        return value
    if isinstance(value, str) and str not in kinds:
        if bool in kinds and value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        return value
    if int in kinds and float(value).is_integer():
        return int(value)
    return float(value) if float in kinds else value


def _repair_rope(rope: dict[str, Any]) -> dict[str, Any]:
    repaired: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):  # one for each kind of layer
            repaired[name] = _repair_rope(value)
        elif isinstance(value, list):
            repaired[name] = [as_one_of(entry, frozenset({float})) for entry in value]
        elif name not in _ROPE_WORDS:
            repaired[name] = as_one_of(value, frozenset({int if name in _ROPE_INTS else float}))
        elif value is not None:  # as if it were not there: the usual embedding
            repaired[name] = value
    return repaired


def _faults(values: Mapping[str, Any], config_class: type[PretrainedConfig]) -> Iterator[str]:
    """What transformers would take, to go wrong later or never say so."""
    yield from faults(values, config_class.attribute_map, {field.name for field in fields(config_class)})
    if type(values.get(_WINDOW)) not in (int, NoneType):
        yield f"{_WINDOW} is {shown(values[_WINDOW])}: not a number of tokens"
    layer_types = values.get("layer_types")
    if values.get(_WINDOW, 0) is None and isinstance(layer_types, list) and "sliding_attention" in layer_types:
        yield f"{_WINDOW} is None: must be a number of tokens, for layer_types has sliding_attention"
    for name in sorted(values.keys() & _own_names(config_class)):
        own, value = getattr(config_class, name), values[name]
        if callable(own) or not isinstance(value, type(own) | dict | None):
            yield f"{name} is {shown(value)}: not what transformers keeps under that name"
    yield from _dtype_faults(values)
    quantization = values.get("quantization_config")
    if quantization is not None:
        yield from _quantization_faults(quantization)


def _quantization_faults(quantization: Any) -> Iterator[str]:
    if not _knows_quantization(quantization):
        yield f"quantization_config is {shown(quantization)}: a quantization unknown to transformers"
    elif (method := quantization.get("quant_method", "bitsandbytes")) not in _SERVED_QUANTIZATIONS:
        yield (
            f"quantization_config: quantized by {method}, which is not served; served are FP8 (fp8,"
            " compressed-tensors), MXFP4 (mxfp4) and bitnet"
        )


def _dtype_faults(values: Mapping[str, Any]) -> Iterator[str]:
    for name in ("dtype", "torch_dtype"):
        dtype = values.get(name)
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if dtype is not None and not isinstance(known, torch.dtype):
            yield f"{name} is {shown(dtype)}: not a type of number that torch knows"
        elif known is not None and not known.is_floating_point:
            yield f"{name} is {shown(dtype)}: not a type of floating-point numbers"


def _own_names(config_class: type[PretrainedConfig]) -> set[str]:
    """Names of what a class does and keeps for itself, and that are no fields of a configuration."""
    data = {field.name for field in fields(config_class)} | {"model_type"}
    own = {name for name in dir(config_class) if not isinstance(getattr(config_class, name), property)}
    return {name for name in own - data if not name.startswith("_")}


def _knows_quantization(quantization: Any) -> bool:
    try:
        return bool(AutoHfQuantizer.supports_quant_method(quantization))
    except (ValueError, TypeError, AttributeError):  # names no method, or is no object
        return False


def _kinds(annotation: object) -> frozenset[type]:
    """The plain types in an annotation such as `int | None`."""
    if get_origin(annotation) in (Union, UnionType):
        return frozenset[type]().union(*(_kinds(part) for part in get_args(annotation)))
    return frozenset({annotation}) if isinstance(annotation, type) else frozenset()


def _unknown(values: Mapping[str, Any]) -> str:
    model_type = values.get("model_type")
    if "auto_map" in values:
        return f"config.json: {shown(model_type)} brings its own code (auto_map), which is not run"
    if model_type is None:
        return "config.json: model_type is missing"
    return f"config.json: model_type is {shown(model_type)}, unknown to transformers {transformers.__version__}"


def _succeeds(attempt: Callable[[Mapping[str, Any]], object], values: Mapping[str, Any], without: str) -> bool:
    try:
        attempt({name: value for name, value in values.items() if name != without})
    except Exception:  # whatever it is, this field alone is not to blame
        return False
    return True


def _with_floats(value: Any) -> Any:
    """What JSON has no word for, as transformers writes it: {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {_FLOAT} and value[_FLOAT] in ("Infinity", "-Infinity", "NaN"):
            return float(value[_FLOAT])
        return {name: _with_floats(entry) for name, entry in value.items()}
    return [_with_floats(entry) for entry in value] if isinstance(value, list) else value


def _copied(value: Any) -> Any:
    """A deep copy of what JSON can hold; configuration classes write into what they are given."""
    if isinstance(value, Mapping):
        return {name: _copied(entry) for name, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value
