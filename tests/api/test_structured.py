"""Fields that give an answer its form: which grammar each means, and what is said of those that cannot be followed."""

import json
from typing import Any

import pytest

from deployments.api.http import build_app
from deployments.grammars import Vocabulary
from deployments.messages import FinishReason, Grammar
from tests.api.fakes import CHAT, COMPLETIONS, INFO, FakeBackend, body_of, build_codec, client_of, playing

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
END = INFO.eos_token_ids[0]


def follows(grammar: Grammar, text: str) -> bool:
    """Whether a text is a whole answer."""
    guide = Vocabulary(build_codec().backend.to_str(), INFO.vocab_size, grammar.end_token_ids).compile(grammar)
    for token in [*text.encode(), END]:
        mask = guide.mask()
        if not mask[token // 8] >> token % 8 & 1:
            return False
        if token != END:
            guide.take([token])
    return True


async def post(path: str, backend: FakeBackend | None = None, **fields: Any) -> tuple[int, Any]:
    async with client_of(build_app(backend or playing("{}", FinishReason.STOP), build_codec(), INFO)) as client:
        response = await client.post(path, json=body_of(path, **fields))
    return response.status_code, response.json()


WANTED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"response_format": {"type": "json_object"}}, ["{}", '{"b": [1, {"c": null}]}'], ["[]", "x", '{"a"}']),
    ({"response_format": FORMAT}, ['{"a":1}', '{\n  "a" : -20 }'], ["{}", '{"a":"1"}', '{"a":1,"b":2}']),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, ["1", "{}"], ["x"]),
    ({"structured_outputs": {"json": SCHEMA}}, ['{"a":1}'], ["{}"]),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ['{"a":1}'], ["{}"]),
    ({"structured_outputs": {"json_object": True}}, ["{}"], ["[]"]),
    ({"structured_outputs": {"regex": "[0-9]{2}"}}, ["12"], ["1", "123", "ab"]),
    ({"structured_outputs": {"choice": ["yes", 'n"o\\', "ja\n"]}}, ["yes", 'n"o\\', "ja\n"], ["ye", "no"]),
    ({"structured_outputs": {"grammar": 'start: "a" b+\nb: "b" | "c"'}}, ["ab", "acb"], ["a", "b"]),
    ({"structured_outputs": {"grammar": 'root ::= "a" b+\nb ::= "b" | "c"'}}, ["ab", "acb"], ["a", "b"]),
    ({"guided_json": SCHEMA}, ['{"a":1}'], ["{}"]),
    ({"guided_regex": "a+"}, ["aa"], ["b"]),
    ({"guided_choice": ["x", "y"]}, ["x"], ["z"]),
    ({"guided_grammar": 'start: "q"'}, ["q"], ["r"]),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "good", "bad"), WANTED)
async def test_a_field_means_its_grammar(path: str, fields: dict[str, Any], good: list[str], bad: list[str]) -> None:
    backend = playing("{}", FinishReason.STOP)
    status, answer = await post(path, backend, **fields)
    assert status == 200, answer
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None and grammar.end_token_ids == INFO.eos_token_ids
    assert [text for text in good if not follows(grammar, text)] == []
    assert [text for text in bad if follows(grammar, text)] == []


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": None}])
async def test_a_body_that_asks_for_no_form_has_no_grammar(fields: dict[str, Any]) -> None:
    backend = playing("x", FinishReason.STOP)
    assert (await post(CHAT, backend, **fields))[0] == 200
    assert backend.requests[0].sampling.grammar is None


def schema_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (schema_of({"type": "strin"}), "response_format.json_schema.schema", "strin"),
    (schema_of({"not": {"type": "string"}}), "response_format.json_schema.schema", "not"),
    (schema_of({"type": "integer", "minimum": 3, "maximum": 2}), "response_format.json_schema.schema", "Unsatisfiable"),
    (schema_of({"$ref": "http://127.0.0.1/x"}), "response_format.json_schema.schema", "127.0.0.1"),
    (schema_of({"$ref": "file:///etc/passwd"}), "response_format.json_schema.schema", "not fetch"),
    (schema_of({"$ref": "#/x", "x": {"$ref": "#/x"}}), "response_format.json_schema.schema", ""),
    (schema_of({"enum": ["x" * 70_000]}), "response_format.json_schema.schema", "65536"),
    (schema_of({"enum": [f"{i:x}" for i in range(2**14)]}), "response_format.json_schema.schema", "65536"),
    (schema_of([]), "response_format.json_schema.schema", "dictionary"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({"response_format": FORMAT | {"type": "json_object"}}, "response_format.json_schema", "only allowed"),
    ({"guided_json": "{"}, "guided_json", "JSON schema"),
    ({"guided_json": "[]"}, "guided_json", "an object"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
    ({"guided_regex": r"(a)\1"}, "guided_regex", "backreferences"),
    ({"guided_grammar": "start: ("}, "guided_grammar", "Expected"),
    ({"guided_grammar": "root ::= ["}, "guided_grammar", "Lark"),
    ({"guided_grammar": "\n" * 60_000}, "guided_grammar", "at most 16384"),
    ({"guided_grammar": "root ::= " + "x " * 10_000}, "guided_grammar", "at most 16384"),
    ({"guided_grammar": "%llguidance {}" + "\n" * 60_000}, "guided_grammar", "start"),
    ({"guided_choice": []}, "guided_choice", "1"),
    ({"guided_choice": ["x"], "guided_regex": "y"}, "guided_choice", "guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "y"}, "guided_regex", "response_format"),
    ({"structured_outputs": {}}, "structured_outputs", "one of them"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "one of them"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
    ({"guided_regex": "a", "min_tokens": 2, "max_tokens": 5}, "min_tokens", "guided_regex"),
]


@pytest.mark.parametrize(("fields", "param", "said"), REFUSED)
async def test_what_cannot_be_followed_is_a_400_that_says_why(fields: dict[str, Any], param: str, said: str) -> None:
    backend = playing("{}", FinishReason.STOP)
    status, answer = await post(CHAT, backend, **fields)
    assert status == 400, answer
    assert answer["error"]["param"] == param and said in answer["error"]["message"], answer
    assert not backend.requests and "<state>" not in answer["error"]["message"]


async def test_a_deep_schema_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    status, answer = await post(CHAT, **schema_of(schema))
    assert status == 400 and "schema" in answer["error"]["param"]
