"""The tables of `docs/compatibility.md` are as the service is: what works is there, what is refused is named."""

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest
from openai.types import chat, completion_create_params, responses, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from deployments.api.http import build_app
from deployments.api.openai import ChatBody, CompletionBody, Message, StreamOptions
from deployments.api.responses.fields import (
    FunctionTool,
    ReasoningOptions,
    ResponseBody,
    ResponseStreamOptions,
    TextFormat,
    TextOptions,
)
from deployments.api.responses.items import FunctionCall, FunctionCallOutput, InputMessage, Reasoning
from deployments.api.strict import Strict
from deployments.api.structured import JsonSchema, ResponseFormat, StructuredOutputs
from deployments.api.tokenization import DetokenizeBody, TokenizeBody
from deployments.api.tools.fields import Function, Tool
from tests.api.fakes import INFO, build_codec, client_of, playing
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "compatibility.md").read_text().partition("\n## Every field\n")[2]
# Asks for something, whatever the field.
PROBE = {"a": 1}


class Place(NamedTuple):
    """Where fields stand: the model that reads them, an endpoint, and a body that is taken, but for one field."""

    model: type[Strict]
    path: str
    put: Any
    known: tuple[Any, ...] = ()


COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SAID = {"role": "user", "content": "x"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
TOOL = {"type": "function", "function": {"name": "f"}}
FLAT_TOOL = {"type": "function", "name": "f"}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": [SAID]} | fields


def items(*items: Any) -> dict[str, Any]:
    return {"input": [SAID, *items]}


ENDPOINTS = {
    "completions": Place(
        CompletionBody,
        COMPLETIONS,
        lambda field: {"prompt": "a"} | field,
        (completion_create_params.CompletionCreateParamsNonStreaming,),
    ),
    "chat": Place(
        ChatBody, CHAT, lambda field: chat_body(**field), (chat_create_params.CompletionCreateParamsNonStreaming,)
    ),
    "responses": Place(
        ResponseBody,
        RESPONSES,
        lambda field: {"input": "a"} | field,
        (response_create_params.ResponseCreateParamsNonStreaming,),
    ),
}
WITHIN_CHATS = {
    "`messages[]`": Place(
        Message,
        CHAT,
        lambda field: chat_body(messages=[SAID | field]),
        (chat.ChatCompletionAssistantMessageParam, chat.ChatCompletionToolMessageParam),
    ),
    "`stream_options`": Place(
        StreamOptions,
        CHAT,
        lambda field: chat_body(stream=True, stream_options=field),
        (chat.ChatCompletionStreamOptionsParam,),
    ),
    "`tools[]`": Place(Tool, CHAT, lambda field: chat_body(tools=[TOOL | field]), (chat.ChatCompletionToolParam,)),
    "`tools[].function`": Place(Function, CHAT, None, (shared_params.FunctionDefinition,)),
    "`response_format`": Place(ResponseFormat, CHAT, None, (shared_params.ResponseFormatJSONSchema,)),
    "`response_format.json_schema`": Place(
        JsonSchema, CHAT, None, (shared_params.response_format_json_schema.JSONSchema,)
    ),
    "`structured_outputs`": Place(
        StructuredOutputs, CHAT, lambda field: chat_body(structured_outputs={"regex": "a"} | field)
    ),
}
WITHIN_RESPONSES = {
    "`stream_options`": Place(
        ResponseStreamOptions,
        RESPONSES,
        lambda field: {"input": "a", "stream": True, "stream_options": field},
        (response_create_params.StreamOptions,),
    ),
    "`text`": Place(
        TextOptions, RESPONSES, lambda field: {"input": "a", "text": field}, (responses.ResponseTextConfigParam,)
    ),
    "`text.format`": Place(TextFormat, RESPONSES, None, (responses.ResponseFormatTextJSONSchemaConfigParam,)),
    "`reasoning`": Place(
        ReasoningOptions, RESPONSES, lambda field: {"input": "a", "reasoning": field}, (shared_params.Reasoning,)
    ),
    "`tools[]`": Place(
        FunctionTool,
        RESPONSES,
        lambda field: {"input": "a", "tools": [FLAT_TOOL | field]},
        (responses.FunctionToolParam,),
    ),
    "`message`": Place(InputMessage, RESPONSES, lambda field: items(SAID | field), (responses.EasyInputMessageParam,)),
    "`function_call`": Place(
        FunctionCall, RESPONSES, lambda field: items(CALL | field), (responses.ResponseFunctionToolCallParam,)
    ),
    "`function_call_output`": Place(
        FunctionCallOutput,
        RESPONSES,
        lambda field: items(CALL, {"type": "function_call_output", "call_id": "1", "output": "x"} | field),
        (responses.response_input_item_param.FunctionCallOutput,),
    ),
    "`reasoning` item": Place(
        Reasoning,
        RESPONSES,
        lambda field: items({"type": "reasoning"} | field, SAID),
        (responses.ResponseReasoningItemParam,),
    ),
}


PAGES = {
    "`/tokenize`": Place(TokenizeBody, "/tokenize", lambda field: chat_body(**field)),
    "`/detokenize`": Place(DetokenizeBody, "/detokenize", lambda field: {"tokens": [1]} | field),
}
TABLES = {"endpoints": ENDPOINTS, "chats": WITHIN_CHATS, "responses": WITHIN_RESPONSES, "pages": PAGES}


class Row(NamedTuple):
    """What a table says of one field."""

    table: str
    place: str
    field: str
    says: str

    @property
    def where(self) -> Place:
        return TABLES[self.table][self.place]

    @property
    def taken(self) -> list[Any]:
        """Values of a refused field that ask for nothing."""
        return [json.loads(value) for value in re.findall(r"\(`(.*)`\)", self.says)]


def rows() -> Iterator[Row]:
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)]
    for name, (_, _, *lines) in zip(TABLES, tables, strict=True):
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if name == "endpoints":
                fields, says = cells[0], dict(zip(ENDPOINTS, cells[2:5], strict=True))
            else:
                fields, says = cells[1], {cells[0]: cells[3]}
            for field in re.findall("`([a-z_]+)`", fields):
                for place, word in says.items():
                    yield Row(name, place, field, word)


ROWS = [*rows()]
TAKEN = ("works", "log", "moot")
REFUSED = [row for row in ROWS if row.says not in TAKEN]


def names_of(row: Row) -> set[str]:
    return {field.alias or name for name, field in row.where.model.model_fields.items()}


def test_tables_say_one_thing_of_each_field() -> None:
    assert len({row[:3] for row in ROWS}) == len(ROWS)
    assert all(re.fullmatch(r"works|log|moot|-|refused( \(`.*`\))?", row.says) for row in ROWS)


def test_every_field_that_is_read_is_in_the_tables_and_every_field_that_is_taken_is_read() -> None:
    for name, places in TABLES.items():
        for place in places:
            told = [row for row in ROWS if row[:2] == (name, place)]
            assert {row.field for row in told if row.says in TAKEN} == names_of(told[0]), place
            assert all((row.field in row.where.model.no_ops) is bool(row.taken) for row in told if row.taken)


def test_the_tables_hold_every_field_that_openais_client_knows() -> None:
    written_for = re.search(r"openai ([0-9.]+)", PAGE)
    assert written_for is not None
    if not version("openai").startswith(written_for[1] + "."):
        pytest.skip("another release of OpenAI's client: it may have other fields, and those are refused as unknown")
    for name, places in TABLES.items():
        for place, where in places.items():
            told = {row.field for row in ROWS if row[:2] == (name, place) and row.says != "-"}
            known = {field for kind in where.known for field in kind.__annotations__}
            assert known <= told, (name, place, known - told)


async def test_what_is_refused_is_a_400_that_names_it_and_what_asks_for_nothing_is_not() -> None:
    backend = playing()
    async with client_of(build_app(backend, build_codec(), INFO)) as client:
        for row in REFUSED:
            answer = await client.post(row.where.path, json=row.where.put({row.field: PROBE}))
            assert answer.status_code == 400, row
            error = answer.json()["error"]
            assert row.field in error["message"] and row.field in (error["param"] or ""), (row, error)
            for value in row.taken:
                # Beyond the tokens that there are, so that nothing has to be played.
                answer = await client.post(row.where.path, json=row.where.put({row.field: value, "top_k": -2}))
                assert row.field not in answer.json()["error"]["message"], row
    assert not backend.calls
