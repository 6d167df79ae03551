"""JSON schemas as clients send them, made ready for llguidance, which follows each of their words or refuses it.

Owns which words of a schema are no rules. A `format` that the standard does not define says what a text means to those
who wrote the schema (Pydantic's `path`, `binary`, `password`), and bounds nothing; nor does it to say that the names of
properties are texts (zod's records). `uniqueItems` cannot be said in a grammar: who asks for `strict` is refused, as
OpenAI does, and to others nothing was promised. Knows no requests.
"""

from collections.abc import Callable, Mapping
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

Schema = dict[str, Any]


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
