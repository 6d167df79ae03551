"""Schemas as clients send them: which of their words are rules, and that those of Pydantic's types can be asked for."""

import pathlib
import re
from collections.abc import Callable
from datetime import date, datetime
from typing import Annotated, Any

import pytest
from pydantic import UUID4, Base64Bytes, BaseModel, FilePath, IPvAnyAddress, PostgresDsn, SecretStr, TypeAdapter
from pydantic import Field as PydanticField

from deployments.api.http import build_app
from deployments.api.json_schema import with_rules_alone
from deployments.grammars import GrammarError, Vocabulary
from deployments.messages import FinishReason, Grammar
from tests.api.fakes import CHAT, INFO, body_of, build_codec, client_of, playing

RESPONSES = "/v1/responses"
VOCABULARY = Vocabulary(build_codec().backend.to_str(), INFO.vocab_size, INFO.eos_token_ids)


class Everything(BaseModel):
    """What instructor's users write."""

    path: pathlib.Path
    file: FilePath
    raw: bytes
    secret: SecretStr
    encoded: Base64Bytes
    number: UUID4
    address: IPvAnyAddress
    database: PostgresDsn
    phone: Annotated[str, PydanticField(json_schema_extra={"format": "phone", "pattern": "^[0-9]+$"})]
    format: str = "uniqueItems"
    tags: set[str]
    others: frozenset[int] = frozenset()


SCHEMA = Everything.model_json_schema()
SETS: dict[str, Any] = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}


def asked_as(kind: str, schema: Any, strict: bool | None) -> tuple[str, dict[str, Any]]:
    """Path and fields of a call with a schema, by the way in which it is asked for."""
    function = {"name": "f", "parameters": schema, "strict": strict}
    if kind == "form":
        return CHAT, {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        }
    if kind == "tool":
        return CHAT, {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    if kind == "response":
        return RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": strict}}}
    return RESPONSES, {"tools": [{"type": "function", **function}], "tool_choice": "required"}


async def post(path: str, fields: dict[str, Any]) -> tuple[int, Any, Grammar | None]:
    backend = playing("{}", FinishReason.STOP)
    body = body_of(CHAT, **fields) if path == CHAT else {"input": "hi", **fields}
    info = INFO.__class__(
        INFO.name, "", max_model_len=4096, vocab_size=INFO.vocab_size, eos_token_ids=INFO.eos_token_ids
    )
    async with client_of(build_app(backend, build_codec(), info)) as client:
        answer = await client.post(path, json=body)
    return answer.status_code, answer.json(), backend.requests[0].sampling.grammar if backend.requests else None


KINDS = ["form", "tool", "response", "response's tool"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [None, False])
async def test_what_pydantic_makes_of_its_types_can_be_asked_for(kind: str, strict: bool | None) -> None:
    status, answer, _ = await post(*asked_as(kind, SCHEMA, strict))
    assert status == 200, answer


@pytest.mark.parametrize("kind", KINDS)
async def test_who_asks_for_strict_is_told_that_a_set_cannot_be_followed(kind: str) -> None:
    schema = {"type": "object", "properties": {"tags": SETS}}
    status, answer, _ = await post(*asked_as(kind, schema, True))
    assert status == 400 and "uniqueItems" in answer["error"]["message"]
    strict = {name: value for name, value in SCHEMA["properties"].items() if "uniqueItems" not in value}
    status, answer, _ = await post(*asked_as(kind, {"type": "object", "properties": strict}, True))
    assert status == 200, "formats of Pydantic's own are no rules, strict or not"


async def test_vllms_fields_have_no_strict_and_are_followed_to_the_letter() -> None:
    for schema in (SETS, TypeAdapter(set[str]).json_schema()):
        status, answer, _ = await post(CHAT, {"guided_json": schema})
        assert status == 400 and "uniqueItems" in answer["error"]["message"]
    status, _, grammar = await post(CHAT, {"guided_json": '{"type": "string", "format": "path", "maxLength": 2}'})
    assert status == 200 and grammar is not None and follows(grammar, '"ab"') and not follows(grammar, '"abc"')


def follows(grammar: Grammar, text: str) -> bool:
    guide = VOCABULARY.compile(grammar)
    for token in text.encode():
        if not guide.mask()[token // 8] >> token % 8 & 1:
            return False
        guide.take([token])
    return True


@pytest.mark.parametrize(
    ("schema", "kept"),
    [
        ({"format": "path"}, {}),
        ({"format": "email"}, {"format": "email"}),
        ({"format": "uri-reference"}, {"format": "uri-reference"}),
        ({"format": 3}, {"format": 3}),
        ({"uniqueItems": False}, {}),
        ({"uniqueItems": True}, {}),
        ({"propertyNames": {"type": "string"}}, {}),
        ({"propertyNames": {"maxLength": 3}}, {"propertyNames": {"maxLength": 3}}),
        ({"uniqueItems": "yes"}, {"uniqueItems": "yes"}),
        ({"properties": {"format": {"format": "path"}}}, {"properties": {"format": {}}}),
        ({"anyOf": [{"format": "x"}, True]}, {"anyOf": [{}, True]}),
        ({"items": [{"format": "x"}]}, {"items": [{}]}),
        ({"items": {"format": "x"}, "not": {"format": "x"}}, {"items": {}, "not": {}}),
        ({"const": {"format": "path"}}, {"const": {"format": "path"}}),
        ({"enum": [{"uniqueItems": True}]}, {"enum": [{"uniqueItems": True}]}),
        ({"default": {"format": "path"}}, {"default": {"format": "path"}}),
        ({"$defs": {"a": {"format": "x"}}, "$ref": "#/$defs/a"}, {"$defs": {"a": {}}, "$ref": "#/$defs/a"}),
    ],
)
def test_words_that_are_no_rules_are_left_out_wherever_a_schema_stands(schema: Any, kept: Any) -> None:
    assert with_rules_alone(schema, is_strict=False) == kept


def test_formats_of_the_standard_that_are_not_known_are_refused() -> None:
    source = '{"grammars": [{"json_schema": {"type": "string", "format": "iri"}}]}'
    with pytest.raises(GrammarError, match="iri"):
        VOCABULARY.compile(Grammar(source, INFO.eos_token_ids, "x"))


def rule_of(kind: str) -> re.Pattern[str]:
    return re.compile(with_rules_alone({"format": kind}, is_strict=True)["pattern"])


def is_read_by(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


def test_dates_are_those_of_the_calendar() -> None:
    rule = rule_of("date")
    for year in (0, 1, 4, 1900, 1999, 2000, 2023, 2024, 2100, 9999):
        texts = [f"{year:04}-{month:02}-{day:02}" for month in range(14) for day in range(33)]
        assert [text for text in texts if bool(rule.search(text)) != is_read_by(date.fromisoformat, text)] == []


@pytest.mark.parametrize("text", ["00:00:00Z", "23:59:59.123456+23:59", "12:30:00-01:00"])
def test_times_are_those_that_clocks_show(text: str) -> None:
    assert rule_of("time").search(text) and rule_of("date-time").search(f"2024-02-29T{text}")
    assert is_read_by(TypeAdapter(datetime).validate_python, f"2024-02-29T{text}")


@pytest.mark.parametrize("text", ["24:00:00Z", "23:59:60Z", "12:60:00Z", "12:00:00", "12:00:00+24:00", "12:00:00.Z"])
def test_others_are_not(text: str) -> None:
    assert not rule_of("time").search(text) and not rule_of("date-time").search(f"2024-02-29T{text}")


async def test_a_pattern_of_the_schemas_own_holds_beside_the_one_of_a_date() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^2024", "allOf": [{"minLength": 1}]}
    rules = with_rules_alone(schema, is_strict=True)
    assert rules["pattern"] == "^2024" and len(rules["allOf"]) == 2 and "format" not in rules
    _, _, grammar = await post(CHAT, {"guided_json": schema})
    assert grammar is not None and follows(grammar, '"2024-02-29"')
    assert not follows(grammar, '"2023-01-01"') and not follows(grammar, '"2024-02-30"')


OPEN = {"properties": {"age": {"type": "integer"}}, "patternProperties": {"^is_": {"type": "boolean"}}}
CONTROL = "\x01"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_name_in_escapes_is_no_way_around_a_rule(kind: str) -> None:
    _, _, grammar = await post(*asked_as(kind, {"type": "object", **OPEN}, None))
    assert grammar is not None
    begin, end = ('<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>") if "tool" in kind else ("", "")
    for answer in ('{"age":1,"is_it":true}', '{"else":"x\\n","else":2}'):
        assert follows(grammar, begin + answer + end)
    for answer in (r'{"\u0061ge":"x"}', r'{"age":1,"\u0061ge":"x"}', r'{"\u0069s_it":1}', r'{"is\u005fit":1}'):
        assert not follows(grammar, begin + answer + end)


@pytest.mark.parametrize("schema", [{"const": f"a{CONTROL}b"}, {"type": "string", "pattern": "^a\\x01b$"}])
async def test_a_text_that_needs_control_characters_is_followed(schema: Any) -> None:
    _, _, grammar = await post(CHAT, {"guided_json": schema})
    assert grammar is not None and follows(grammar, r'"a\u0001b"') and not follows(grammar, '"ab"')


UNSAYABLE = [
    ({**OPEN, "additionalProperties": True, "properties": {"x": {"const": CONTROL}}}, "control characters"),
    ({**OPEN, "properties": {"x": {"pattern": "^\\v+$"}}}, "control characters"),
    ({"minProperties": 2}, "minProperties"),
    ({"minProperties": 3, "required": ["a"]}, "minProperties"),
    ({"minProperties": 2, "patternProperties": {"^a": {}}, "additionalProperties": False}, "minProperties"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("schema", "reason"), UNSAYABLE)
async def test_what_needs_names_that_differ_is_refused_with_strict_and_taken_without(
    kind: str, schema: dict[str, Any], reason: str
) -> None:
    status, answer, _ = await post(*asked_as(kind, {"type": "object", **schema}, True))
    assert status == 400 and reason in answer["error"]["message"] and "cannot be followed" in answer["error"]["message"]
    status, answer, _ = await post(*asked_as(kind, {"type": "object", **schema}, None))
    assert status == 200, answer


@pytest.mark.parametrize(
    "schema",
    [
        {"minProperties": 1},
        {"minProperties": 2, "properties": {"a": {}}, "required": ["a"]},
        {"properties": {"x": {"const": CONTROL}}, "required": ["x"], "additionalProperties": False},
        {**OPEN, "properties": {"x": {"pattern": r"^\p{L}[\x20-\x7e]*\n$"}}},
    ],
)
async def test_what_a_grammar_can_say_of_names_is_taken_with_strict(schema: dict[str, Any]) -> None:
    status, answer, _ = await post(*asked_as("form", {"type": "object", **schema}, True))
    assert status == 200, answer
