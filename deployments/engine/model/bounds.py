"""What the numbers of a `config.json` may be. transformers takes any, to go wrong later or never say so.

Bounds leave room around what checkpoints are known to have. Knows no weights and builds nothing. Called by `config.py`
once values have their types.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Products of two positions are calculated with, in 64 bits (`scheduling/positions.py`).
MAX_MODEL_LEN = 2**30
ROPE_FIELDS = ("rope_parameters", "rope_scaling")
# As transformers calls them; a class's `attribute_map` has its own names for some.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
)
# Experts of a layer.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")
# Names of one kind of embedding, older and newer.
_SAME_ROPE = frozenset({frozenset({"su", "longrope"}), frozenset({"mrope", "default"})})
_HEADS = ("num_attention_heads", "num_key_value_heads")
_ORDERED = (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor"))
_ENTRIES = re.compile(r"\.(short|long)_factor\[\d+\]$")


@dataclass(frozen=True, slots=True)
class _Bound:
    """What a number must be; `said` says it."""

    holds: Callable[[float], bool]
    said: str


_POSITIVE = _Bound(lambda value: value > 0, "greater than 0")
_NOT_NEGATIVE = _Bound(lambda value: value >= 0, "at least 0")
# More than ten times the deepest known; transformers lists them all while it reads a configuration.
_DEPTH = _Bound(lambda value: 0 < value <= 10_000, "greater than 0, and at most 10000")
_LENGTH = _Bound(lambda value: 0 < value <= MAX_MODEL_LEN, f"greater than 0, and at most {MAX_MODEL_LEN}")
_EPSILON = _Bound(lambda value: 0 < value < 0.1, "greater than 0 and less than 0.1")
_BASE = _Bound(lambda value: value > 1, "greater than 1")
_SHARE = _Bound(lambda value: 0 < value <= 1, "greater than 0 and at most 1")
# By name, wherever it stands.
_BOUNDS = {
    **dict.fromkeys(_SIZES, _POSITIVE),
    "num_hidden_layers": _DEPTH,
    **dict.fromkeys(("num_experts_per_tok", *NUM_EXPERTS), _NOT_NEGATIVE),  # of families that can do without
    **dict.fromkeys(_LENGTHS, _LENGTH),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rotary_emb_base"), _BASE),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _SHARE),
}
# By name, where the model's class has such a field; of others it is a leftover.
_OF_ITS_CLASS = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), _POSITIVE)
# By name within the parameters of rotary embeddings.
_OF_ROPE = {
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "attention_factor"), _POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow"), _POSITIVE),
    **dict.fromkeys(("mscale", "mscale_all_dim"), _NOT_NEGATIVE),
}


def faults(values: Mapping[str, Any], own_names: Mapping[str, str], known: Collection[str]) -> Iterator[str]:
    """What is out of bounds: field, value and bound.

    Args:
        values: of a `config.json`.
        own_names: names that the model's class has for transformers'.
        known: fields of the model's class.
    """
    renamed = {own: _BOUNDS[name] for name, own in own_names.items() if name in _BOUNDS}
    renamed |= {name: bound for name, bound in _OF_ITS_CLASS.items() if name in known}
    for path, name, value in _numbers(values):
        # Only a limit, one of a pair, may be infinite.
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and name)):
            yield f"{path} is {shown(value)}: not a finite number"
        elif (bound := _bound(path, name) or renamed.get(name)) is not None and not bound.holds(value):
            yield f"{path} is {shown(value)}: must be {bound.said}"
    yield from _rope_faults(values)
    yield from _unlike(values, own_names)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bound(path: str, name: str) -> _Bound | None:
    if "norm" in name and name.endswith(("eps", "epsilon")):
        return _EPSILON
    if path.startswith(ROPE_FIELDS):
        return _POSITIVE if _ENTRIES.search(path) else _OF_ROPE.get(name) or _BOUNDS.get(name)
    return _BOUNDS.get(name)


def _rope_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Where one rotary embedding is described twice, and not alike."""
    kinds: dict[str, str] = {}
    for field in ROPE_FIELDS:
        rope = values.get(field)
        for path, parameters in _each_rope(field, rope if isinstance(rope, Mapping) else {}):
            named = {f"{path}.{key}": parameters[key] for key in ("rope_type", "type") if key in parameters}
            if path == field:
                kinds |= named
            yield from _disagreeing(named)
            for greater, less in _ORDERED:
                high, low = parameters.get(greater), parameters.get(less)
                if isinstance(high, float) and isinstance(low, float) and high < low:  # Llama 4 has them alike
                    yield f"{path}.{greater} is {high}: must be at least {less}, {low}"
    yield from _disagreeing(kinds)
    yield from _disagreeing(
        {
            path: rope["rope_theta"]
            for path, rope in [("", values), *((field, values.get(field)) for field in ROPE_FIELDS)]
            if isinstance(rope, Mapping) and rope.get("rope_theta") is not None
        },
        ".rope_theta",
    )


def _each_rope(path: str, rope: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, rope
    for name, value in rope.items():
        if isinstance(value, Mapping):  # one for each kind of layer
            yield f"{path}.{name}", value


def _disagreeing(named: Mapping[str, Any], suffix: str = "") -> Iterator[str]:
    (first, *others) = named or [""]
    for other in others:
        pair = (named[first], named[other])
        if pair[0] != pair[1] and not (all(isinstance(kind, str) for kind in pair) and frozenset(pair) in _SAME_ROPE):
            first_name, other_name = ((path + suffix).removeprefix(".") for path in (first, other))
            yield f"{first_name} is {shown(pair[0])} and {other_name} is {shown(pair[1])}: they must be the same"
            return


def _unlike(values: Mapping[str, Any], own_names: Mapping[str, str]) -> Iterator[str]:
    """Numbers that do not go with one another."""
    for name, own in own_names.items():
        if name in values and own in values and name != own:
            yield from _disagreeing({own: values[own], name: values[name]})
    (_, heads), (of_groups, groups) = (_number(values, own_names, name) for name in _HEADS)
    if heads and groups and heads % groups:
        yield f"{of_groups} is {groups}: must divide num_attention_heads, {heads}"
    _, chosen = _number(values, own_names, "num_experts_per_tok")
    for name in NUM_EXPERTS:
        _, experts = _number(values, own_names, name)
        if chosen is not None and experts and not 1 <= chosen <= experts:
            named = own_names.get(name, name)
            yield f"num_experts_per_tok is {chosen}: must be greater than 0 and at most {named}, {experts}"


def _number(values: Mapping[str, Any], own_names: Mapping[str, str], name: str) -> tuple[str, int | None]:
    """A whole number, and the name that it has."""
    named = name if name in values else own_names.get(name, name)
    value = values.get(named)
    return named, value if type(value) is int else None


def _numbers(value: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, float]]:
    """All numbers in there, each with its path and its name; those of a list have no name."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _numbers(entry, f"{path}.{key}" if path else key, key)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _numbers(entry, f"{path}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, name, value
