"""Dotted `key=value` arguments: into a nested model, out as a listing, and what is said about wrong ones.

Knows pydantic models and nothing of what their fields mean: `app/config.py` owns those and is its only caller. The
meanings in the listing are read from the `Attributes:` of the models' docstrings, so that they are written once.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from deployments.errors import KvRelayError

_ATTRIBUTE = re.compile(r"^    (\w+): (.+?)(?=^    \w+: |^\S|\Z)", re.MULTILINE | re.DOTALL)


class ConfigError(KvRelayError):
    """An argument is unknown or out of bounds; the message has one line for each."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument as the user writes it.

    Attributes:
        name: the dotted key; `.KEY` stands for a key of the user's choice.
        default: as it would be written.
        meaning: one sentence.
    """

    name: str
    default: str
    meaning: str


def unflatten(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys at the top into nested mappings; what is nested already (YAML) is merged, not split.

    A field that holds a mapping takes the rest of the key whole: `decode.node_labels.ray.io/zone=a` sets `ray.io/zone`.

    Raises:
        ConfigError: one key is given twice, or both itself and a part of it.
    """
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = _split(model, key)
        for parent in reversed([*parents, last]):
            value = {parent: value}
        _merge(nested, value, ())
    return nested


def _split(model: type[BaseModel], key: str) -> list[str]:
    part, _, rest = key.partition(".")
    field = model.model_fields.get(part)
    if not rest or field is None:
        return [key]
    nested = _nested_model(field)
    return [part, *_split(nested, rest)] if nested else [part, rest]


def _merge(into: dict[str, Any], values: Mapping[str, Any], path: tuple[str, ...]) -> None:
    for key, value in values.items():
        here = (*path, key)
        if key not in into:
            into[key] = value
        elif isinstance(into[key], Mapping) and isinstance(value, Mapping):
            into[key] = dict(into[key])  # the caller's own mapping stays as it is
            _merge(into[key], value, here)
        else:
            raise ConfigError(f"{'.'.join(here)} is given twice: {into[key]!r} and {value!r}")


def describe_errors(model: type[BaseModel], error: ValidationError) -> str:
    """Say in plain lines which arguments are wrong, their values, and what is allowed."""
    names = [argument.name for argument in arguments_of(model)]
    lines = [_describe(names, detail) for detail in error.errors()]
    head = "1 argument is wrong" if len(lines) == 1 else f"{len(lines)} arguments are wrong"
    return "\n  ".join([f"{head} (`{sys.executable} -m app.config` lists them all):", *lines])


def _describe(names: list[str], detail: ErrorDetails) -> str:
    name, value = ".".join(map(str, detail["loc"])), detail["input"]
    if detail["type"] == "extra_forbidden":
        near = _near(name, names)
        return f"{name}={_show(value)}: no such argument" + (f"; did you mean {' or '.join(near)}?" if near else "")
    reason = detail["msg"].removeprefix("Value error, ")
    if isinstance(value, BaseModel | Mapping):  # about how the parts fit, and too long to repeat
        return f"{name}: {reason}"
    return f"{name}={_show(value)}: {reason[0].lower()}{reason[1:]}"


def _near(name: str, names: list[str]) -> list[str]:
    """Find arguments of a similar name; else one whose last part is similar, for a right name in a wrong place."""
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in reversed(names)}
    return get_close_matches(name, names, n=2, cutoff=0.75) or [
        leaves[leaf] for leaf in get_close_matches(name.rpartition(".")[2], leaves, n=1, cutoff=0.85)
    ]


def list_arguments(model: type[BaseModel]) -> str:
    """Return the listing of every argument with its default and meaning; a group that recurs is told once."""
    arguments = list(arguments_of(model, once=True))
    widths = max(len(a.name) for a in arguments), max(len(a.default) for a in arguments)
    rows = [f"{a.name:{widths[0]}}  {a.default:{widths[1]}}  {a.meaning}" for a in arguments]
    return "\n".join([f"{'ARGUMENT':{widths[0]}}  {'DEFAULT':{widths[1]}}  MEANING", *rows])


def arguments_of(model: type[BaseModel], *, once: bool = False) -> Iterator[Argument]:
    """Yield every argument of a model, nested ones under their dotted names, in the order of the fields.

    Args:
        model: its fields are arguments, except those excluded from dumps.
        once: yield the arguments of a nested model where it first occurs, then one that refers to them.
    """
    yield from _walk(model, "", {} if once else None)


def _walk(model: type[BaseModel], prefix: str, seen: dict[type[BaseModel], str] | None) -> Iterator[Argument]:
    meanings = _meanings(model)
    for name, field in model.model_fields.items():
        nested = _nested_model(field)
        if nested is None:
            key = ".KEY" if get_origin(field.annotation) is dict else ""
            if not field.exclude:
                yield Argument(f"{prefix}{name}{key}", _default(field), meanings[name])
        elif seen is not None and (first := seen.setdefault(nested, f"{prefix}{name}")) != f"{prefix}{name}":
            yield Argument(f"{prefix}{name}.*", "-", f"{meanings[name]} As `{first}.*`.")
        else:
            yield from _walk(nested, f"{prefix}{name}.", seen)


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Read the `Attributes:` sections of a model and its bases."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")
        found |= {name: " ".join(meaning.split()) for name, meaning in _ATTRIBUTE.findall(section)}
    return found


def _nested_model(field: FieldInfo | None) -> type[BaseModel] | None:
    annotation = field.annotation if field is not None else None
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None or field.default in (None, ()):
        return "-"
    return _show(field.default)


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
