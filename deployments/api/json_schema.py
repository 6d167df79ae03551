"""JSON schemas as clients send them, made ready for llguidance, which follows each of their words or refuses it.

Owns which words of a schema are no rules. A `format` that the standard does not define says what a text means to those
who wrote the schema (Pydantic's `path`, `binary`, `password`), and bounds nothing; nor does it to say that the names of
properties are texts (zod's records).

Owns what no grammar can say, too: `uniqueItems`, and `minProperties` of which more than one may have any name, for the
same could come again. Who asks for `strict` is refused, as OpenAI does, and to others nothing was promised. Knows no
requests.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Of JSON Schema's drafts 4 to 2020-12. Those of them that llguidance does not know it refuses.
_STANDARD_FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "regex", "uuid", "json-pointer", "relative-json-pointer"),
        *("email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "iri", "iri-reference", "uri-template"),
    )
)
# The Gregorian calendar from year 1 on, seconds from 0 to 59 with microseconds at most: what Python's can hold.
_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[1-9]|1[0-2])-{_DAY}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)|{_LEAP_YEAR}-02-29)"
)
_HOUR_AND_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_AND_MINUTE}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_HOUR_AND_MINUTE})"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
# Words that hold a schema, a list of them, or several by name.
_ONE = frozenset(
    (
        *("additionalProperties", "additionalItems", "items", "contains", "propertyNames", "not", "if", "then", "else"),
        *("unevaluatedItems", "unevaluatedProperties"),
    )
)
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems", "items"))
_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))

# At a place where JSON allows it a model may write so much white space: else some go on with that for ever.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,16}"
_GUIDANCE: dict[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": _WHITE_SPACE, "lenient": False}
# llguidance takes a name that is written in escapes (`"\u0061"`) for another than the one it is. So answers have these
# escapes alone, and only the control characters that have them.
_ESCAPES = 'nrbtf\\"'
# What may stand for other control characters: they themselves, and in patterns escapes, and classes that may hold
# nothing else.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_CONTROL_IN_PATTERN = re.compile(
    rf"{_CONTROL.pattern}|\\x(?:[01]|7[fF]|\{{)|\\u(?:00[01]|007[fF]|\{{)|\\[0acv]|\\[pP](?!\{{?[LMNPSZ])|\[:"
)

Schema = dict[str, Any]


class UnsayableError(Exception):
    """A schema asks for what no grammar can say; the message says for what."""


def as_followed(schema: Mapping[str, Any], *, is_strict: bool) -> Schema:
    """A schema in the form in which llguidance follows it.

    Args:
        schema: nothing of it is changed.
        is_strict: each of its rules is to be followed; else those that no grammar can say are left out.

    Raises:
        UnsayableError: it is strict and has such a rule.
        RecursionError: it is nested too deeply.
    """
    rules = with_rules_alone(schema, is_strict=is_strict)
    if is_strict:
        _check_names(rules)
    if any(_texts_with_controls(rules)):
        return rules | {"x-guidance": _GUIDANCE}
    return rules | {"x-guidance": _GUIDANCE | {"json_allowed_escapes": _ESCAPES}}


def _check_names(schema: Schema) -> None:
    """Raises `UnsayableError` where a name could be written twice, in a way that matters."""
    control = next(_texts_with_controls(schema), None)
    for part in _parts(schema):
        named = [part.get(word) for word in ("properties", "patternProperties", "required")]
        is_closed = part.get("additionalProperties") is False
        if control is not None and any(named) and not is_closed:
            message = f"{control!r} has control characters, which only goes with additionalProperties: false everywhere"
            raise UnsayableError(message)
        least, required = part.get("minProperties", 0), named[2] if isinstance(named[2], list) else []
        if isinstance(least, int | float) and least > len(required) + 1 and (named[1] or not is_closed):
            message = f"minProperties is {least}, which leaves more than one name open: no grammar keeps them apart"
            raise UnsayableError(message)


def _texts_with_controls(schema: Schema) -> Iterator[str]:
    """Texts that an answer can only follow with control characters that have no escapes of their own, perhaps."""
    for part in _parts(schema):
        pattern, of_names = part.get("pattern"), part.get("patternProperties")
        patterns = [pattern, *(of_names if isinstance(of_names, Mapping) else ())]
        yield from (text for text in patterns if isinstance(text, str) and _CONTROL_IN_PATTERN.search(text))
        yield from (text for text in _texts([part.get("const"), part.get("enum")]) if _CONTROL.search(text))


def _parts(value: object) -> Iterator[Mapping[str, Any]]:
    """All objects in a schema, be they schemas or not."""
    if isinstance(value, Mapping):
        yield value
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _parts(item)


def _texts(value: object) -> Iterator[str]:
    """In a value, without the names of its properties."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def with_rules_alone(schema: Mapping[str, Any], *, is_strict: bool) -> Schema:
    """A schema without the words that are no rules.

    Args:
        schema: nothing of it is changed.
        is_strict: each of its rules is to be followed; else those that no grammar can say are left out.

    Raises:
        RecursionError: it is nested too deeply.
    """

    def walk(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kept = {word: item for word, item in value.items() if not _is_dropped(word, item, is_strict)}
        return _with_exact_dates({word: _change(word, item, walk) for word, item in kept.items()})

    walked: Schema = walk(schema)
    return walked


def _is_dropped(word: str, value: object, is_strict: bool) -> bool:
    if word == "format":
        return isinstance(value, str) and value not in _STANDARD_FORMATS
    if word == "propertyNames":
        return value is True or value in ({}, {"type": "string"})
    return word == "uniqueItems" and isinstance(value, bool) and not (value and is_strict)


def _with_exact_dates(schema: Schema) -> Schema:
    named = schema.get("format")
    if not isinstance(named, str) or named not in _PATTERNS:
        return schema
    rest, rule = {word: value for word, value in schema.items() if word != "format"}, {"pattern": _PATTERNS[named]}
    if "pattern" not in rest:
        return rest | rule
    others = rest.get("allOf")
    return rest | {"allOf": [*(others if isinstance(others, list) else ()), rule]}


def _change(word: str, value: Any, walk: Callable[[Any], Any]) -> Any:
    """The value of a word, with the schemas in it walked through; what an instance may be is no schema."""
    if word in _LISTS and isinstance(value, list):
        return [walk(item) for item in value]
    if word in _MAPS and isinstance(value, Mapping):
        return {name: walk(item) for name, item in value.items()}
    return walk(value) if word in _ONE else value
