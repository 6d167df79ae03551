"""From a body's fields to the grammar of its answer: `response_format`, and what vLLM names besides.

Owns which field means which grammar. Whether a grammar can be followed `grammar_check.py` finds out, beside the event
loop. Nothing of a grammar is evaluated or fetched: a `$ref` reaches into its own schema alone.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Annotated, Any, Literal, Self

import orjson
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.json_schema import Schema, UnsayableError, as_followed
from deployments.api.strict import Strict
from deployments.errors import InvalidRequestError
from deployments.grammars import MAX_SOURCE_CHARACTERS
from deployments.messages import Grammar

MAX_CHOICES = 1024
# GBNF is translated on the event loop, in time that grows with the square of the rules: 0.1 s for 1,000 that name each
# other, which are so long (a shared Xeon, 2026-11-28).
MAX_GBNF_CHARACTERS = 2**14

# A schema, or its JSON.
SchemaOrText = Schema | Annotated[str, Field(min_length=1)]
Pattern = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchema(Strict):
    """A named schema. `strict`: it is followed to the letter, or refused; else but for what no grammar can say."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


# Said to those who read the description; the check is `_check_schema`.
_SCHEMA_ONLY_WITH_ITS_TYPE: dict[str, Any] = {
    "if": {"properties": {"type": {"const": "json_schema"}}},
    "then": {"properties": {"json_schema": {"type": "object"}}, "required": ["json_schema"]},
    "else": {"properties": {"json_schema": {"type": "null"}}},
}


class ResponseFormat(Strict):
    """Any text, any JSON object, or JSON that a schema describes."""

    model_config = ConfigDict(json_schema_extra=_SCHEMA_ONLY_WITH_ITS_TYPE)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("missing", "is required", {"field": "json_schema"})
        if self.type != "json_schema" and self.json_schema is not None:
            message = "only allowed with the type 'json_schema'"
            raise PydanticCustomError("json_schema", message, {"field": "json_schema"})
        return self


class StructuredOutputs(Strict):
    """What vLLM takes under this name: one of these."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    json_: SchemaOrText | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        num_asked = len(self.model_fields_set)
        if num_asked != 1:
            raise PydanticCustomError("structure", f"must hold one of them, got {num_asked}", {"field": None})
        return self


class StructuredFields(Strict):
    """Fields of bodies, of which one at most asks for anything. `guided_*` are older names of vLLM's."""

    response_format: ResponseFormat = ResponseFormat(type="text")
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None


_FIELDS = tuple(StructuredFields.model_fields)
_ASKED = {"not": {"anyOf": [{"type": "null"}, {"properties": {"type": {"const": "text"}}, "required": ["type"]}]}}
# For the description of the API: no two of the fields go together.
ONE_AT_MOST = [
    {"not": {"properties": {one: _ASKED, other: _ASKED}, "required": [one, other]}}
    for one, other in combinations(_FIELDS, 2)
]


def fields_that_ask(body: StructuredFields) -> list[str]:
    """Which fields of a body want its answer to have a form."""
    asked = [name for name in _FIELDS[1:] if getattr(body, name) is not None]
    return asked if body.response_format.type == "text" else [_FIELDS[0], *asked]


def read_grammar(body: StructuredFields, end_token_ids: tuple[int, ...]) -> Grammar | None:
    """What the answer must look like; None: like anything.

    Args:
        body: of a request.
        end_token_ids: those of the model.

    Raises:
        InvalidRequestError: names the field and what is wrong with it.
    """
    asked = fields_that_ask(body)
    if not asked:
        return None
    if not end_token_ids:
        raise InvalidRequestError(
            f"{asked[0]} needs a model with a token that ends a text; this one has none", asked[0]
        )
    field, kind, wanted = _read(body, asked[0])
    return Grammar(check_source(_SOURCES[kind](wanted, field), field), end_token_ids, field)


def parts_of(source: str) -> list[dict[str, Any]]:
    """The grammars that a source is made of, of which the first begins."""
    try:
        parts = orjson.loads(source)["grammars"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        parts = None
    is_list = isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts)
    return parts if is_list else [{"lark_grammar": source}]


def check_source(source: str, field: str) -> str:
    """Return the source of a grammar that engines would read.

    Raises:
        InvalidRequestError: it is too long.
    """
    if len(source) > MAX_SOURCE_CHARACTERS:
        message = f"{field} makes a grammar of {len(source)} characters; at most {MAX_SOURCE_CHARACTERS} may be"
        raise InvalidRequestError(message, field)
    return source


def _read(body: StructuredFields, name: str) -> tuple[str, str, Any]:
    """The field that asks, by its path; what kind of grammar it holds, and the grammar."""
    value: Any = getattr(body, name)
    if isinstance(value, ResponseFormat):
        if value.json_schema is None:
            return name, "json", {"type": "object"}
        schema = value.json_schema.schema_
        kind = "json" if value.json_schema.strict else "loose_json"
        return f"{name}.json_schema.schema", kind, {} if schema is None else schema
    if isinstance(value, StructuredOutputs):
        if value.json_object:
            return f"{name}.json_object", "json", {"type": "object"}
        kinds = {"json": value.json_, "regex": value.regex, "choice": value.choice, "grammar": value.grammar}
        kind = next(kind for kind, wanted in kinds.items() if wanted is not None)
        return f"{name}.{kind}", kind, kinds[kind]
    return name, name.removeprefix("guided_"), value


def _json_source(schema: Schema | str, field: str, *, is_strict: bool = True) -> str:
    try:
        if isinstance(schema, str):
            schema = check_source(schema, field)
            schema = orjson.loads(schema)
        if not isinstance(schema, dict):
            raise InvalidRequestError(f"{field} must be a JSON schema, an object", field)
        return LLMatcher.grammar_from_json_schema(orjson.dumps(as_followed(schema, is_strict=is_strict)).decode())
    except UnsayableError as error:
        raise InvalidRequestError(f"{field} cannot be followed: {error}", field) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field} is not a JSON schema: {error}", field) from None


def _regex_source(pattern: str, field: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def _choice_source(choices: list[str], field: str) -> str:
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))


def _grammar_source(grammar: str, field: str) -> str:
    """Lark's notation, or GBNF, as vLLM with llguidance."""
    if len(grammar) > MAX_SOURCE_CHARACTERS:
        return grammar  # refused for its length
    if _IS_LARK.search(grammar):
        return LLMatcher.grammar_from_lark(grammar)
    if len(grammar) > MAX_GBNF_CHARACTERS:
        message = f"{field} is GBNF of {len(grammar)} characters; at most {MAX_GBNF_CHARACTERS} may be"
        raise InvalidRequestError(message, field)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(grammar))
    except Exception as error:  # whatever it stumbles over
        raise InvalidRequestError(f"{field} is not a grammar in Lark's notation or GBNF: {error}", field) from None


# As llguidance tells them apart. Its own expression takes a minute for 60,000 line breaks, for it begins anew at each.
_IS_LARK = re.compile(r"^[^\S\n]*(%llguidance\b|start\s*:)", re.MULTILINE)


_SOURCES: dict[str, Callable[[Any, str], str]] = {
    "json": _json_source,
    "loose_json": partial(_json_source, is_strict=False),
    "regex": _regex_source,
    "choice": _choice_source,
    "grammar": _grammar_source,
}
