"""The description of the API says what the API does: its routes, what bodies it takes, what it answers."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from deployments.api.calls import parse_body
from deployments.api.guard import OPEN_PATHS
from deployments.api.http import build_app
from deployments.api.live_page import ASSETS
from deployments.api.openai import ChatBody, CompletionBody, ModelBody
from deployments.api.openapi import describe_api
from deployments.api.responses.fields import ResponseBody
from deployments.api.tokenization import DetokenizeBody, TokenizeBody
from deployments.errors import InvalidRequestError
from deployments.messages import FinishReason
from tests.api.fakes import CHAT, COMPLETIONS, INFO, body_of, build_codec, client_of, events_of, playing

PARTS = {f"/live/{name}" for name in ASSETS}
API = json.loads(json.dumps(describe_api()))


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(schema | {"components": API["components"]})


def shape(name: str) -> Draft202012Validator:
    return validator({"$ref": f"#/components/schemas/{name}"})


def test_every_route_is_described_with_its_methods_and_no_other() -> None:
    app = build_app(playing(), build_codec(), INFO)
    routes = {
        (route.path.replace(":path", ""), method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert routes == {(path, method) for path, methods in API["paths"].items() for method in methods}


def test_what_needs_a_key_is_said_to() -> None:
    open_paths = {
        path for path, methods in API["paths"].items() for one in methods.values() if {"key": []} not in one["security"]
    }
    assert open_paths == (OPEN_PATHS - PARTS) | {"/live/{name}"}


def test_all_that_is_referred_to_is_there_and_every_schema_is_valid() -> None:
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(API)))
    assert names <= API["components"]["schemas"].keys()
    for schema in API["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


KINDS: dict[str, type[ModelBody]] = {
    "CompletionBody": CompletionBody,
    "ChatBody": ChatBody,
    "ResponseBody": ResponseBody,
    "TokenizeBody": TokenizeBody,
    "DetokenizeBody": DetokenizeBody,
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGE: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "nobody"])},
    optional={
        "content": st.sampled_from(
            [
                "x",
                None,
                3,
                [],
                [{"type": "text", "text": "x", "more": 1}],
                [{"type": "image_url"}],
                [{"type": "refusal"}],
            ]
        ),
        "refusal": st.sampled_from(["", None, "no"]),
        "name": st.sampled_from(["a", None, 1]),
        "tool_calls": st.sampled_from([None, [], [{}], [TOOL_CALL]]),
        "nothing": st.just(1),
    },
)
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {}}
NAMED = {"type": "function", "name": "f"}
ITEM: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "other", None]),
        "role": st.sampled_from(["user", "assistant", "tool"]),
        "content": st.sampled_from(["x", None, [], [{"type": "input_text", "text": "x"}]]),
        "call_id": st.sampled_from(["", "a"]),
        "name": st.just("f"),
        "arguments": st.just("{}"),
        "output": st.sampled_from(["x", 3]),
        "summary": st.sampled_from([[], None, [{"type": "summary_text", "text": "x"}]]),
        "status": st.sampled_from(["completed", "lost"]),
    },
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, -1, 0.5, 1.5, -0.5, 2**62, 2**64, 1e300, "", "a", "a" * 1025, "a" * 257, [], {}]),
    # No ids below 0, which are refused with those above: where the vocabulary is known (test_refused_calls.py).
    st.lists(st.sampled_from([0, 1, 300, "a", "", 1.5, True, None, [1], ["a"]]), max_size=3),
    st.sampled_from([[TOOL], [TOOL] * 129, "auto", "none", {"type": "function", "function": {"name": "f"}}]),
    st.sampled_from([["a"] * 33, [1] * 129, {"type": "text"}, {"include_usage": True}, {"include_usage": 1}, {"a": 1}]),
    st.lists(MESSAGE, max_size=2),
    st.lists(ITEM, max_size=2),
    st.sampled_from(
        [[FLAT_TOOL], NAMED, {"type": "allowed_tools", "tools": [NAMED]}, ["message.output_text.logprobs"]]
    ),
    st.sampled_from([{"format": form} for form in (None, {"type": "text", "name": "a"}, {"type": "json_object"})]),
    st.sampled_from([{"format": {"type": "json_schema", **more}} for more in ({}, {"name": "a", "schema": {}})]),
)
# What JSON Schema cannot say, or says otherwise: fields that do not go together, and 1.0, which to it is an integer.
BEYOND = re.compile(
    r"cannot go with|means the same|got 1\.0|is too large|not with stream|only allowed with logprobs|must be at least|"
    r"cannot be streamed|are more than|there is no answer"
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    properties = sorted(API["components"]["schemas"][kind]["properties"])
    body: dict[str, Any] = {"prompt": "a"} if kind in ("CompletionBody", "TokenizeBody") else {"tokens": [1]}
    if kind == "ChatBody":
        body = {"messages": [{"role": "user", "content": "x"}]}
    if kind == "ResponseBody":
        body = {"input": "a"}
    return kind, body | draw(st.dictionaries(st.sampled_from([*properties, "nothing"]), VALUES, max_size=3))


@settings(max_examples=400)
@given(bodies())
@example(("CompletionBody", {"prompt": "a", "logprobs": -1}))
@example(("CompletionBody", {"prompt": "a", "logprobs": 21}))
@example(("ChatBody", {"messages": [{"role": "assistant"}], "stream": True, "stream_options": {"include_usage": True}}))
def test_a_body_is_taken_only_if_it_is_as_described_and_refused_only_if_not(drawn: tuple[str, dict[str, Any]]) -> None:
    kind, body = drawn
    faults = [fault.message for fault in shape(kind).iter_errors(body)]
    try:
        parse_body(json.dumps(body).encode(), KINDS[kind], ANY_MODEL)
    except InvalidRequestError as refused:
        assert faults or BEYOND.search(str(refused)), f"described, but refused: {refused}"  # noqa: PT017
    else:
        assert not faults, f"taken, but not described: {faults}"


# Any name of a model is taken for the one that is served: here its form counts alone.
class _AnyName(str):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)

    __hash__ = str.__hash__


ANY_MODEL = INFO.__class__(_AnyName("any"), "", 64, 257, ())


@pytest.mark.parametrize(
    ("path", "whole", "chunk"), [(COMPLETIONS, "Completion", "Completion"), (CHAT, "ChatCompletion", "ChatChunk")]
)
async def test_answers_have_the_described_shape(path: str, whole: str, chunk: str) -> None:
    backend = playing("a", "b", FinishReason.STOP)
    async with client_of(build_app(backend, build_codec(), INFO)) as client:
        answer = await client.post(path, json=body_of(path, return_token_ids=True))
        shape(whole).validate(answer.json())
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        answer = await client.post(path, json=body_of(path, **options))
        for event in events_of(answer.content):
            if event != "[DONE]":
                shape(chunk).validate(event)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", f"/v1/models/{INFO.name}", None),
        ("GET", "/v1/models/other", None),
        ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}),
        ("POST", "/tokenize", {}),
        ("POST", "/detokenize", {"tokens": [97]}),
        ("GET", "/health", None),
        ("GET", "/version", None),
        ("POST", COMPLETIONS, {"model": "other", "prompt": "a"}),
    ],
)
@pytest.mark.parametrize("is_healthy", [True, False])
async def test_other_answers_too(method: str, path: str, body: Any, is_healthy: bool) -> None:
    backend = playing()
    backend.healthy = (is_healthy, "why not")
    async with client_of(build_app(backend, build_codec(), INFO)) as client:
        answer = await client.request(method, path, json=body)
    described = API["paths"]["/v1/models/{model_id}" if path.startswith("/v1/models/") else path][method.lower()]
    schema = described["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
    validator(schema).validate(answer.json())


@pytest.mark.parametrize("root", ["", "/kv"])
async def test_the_document_says_where_the_service_is_mounted(root: str) -> None:
    transport = httpx.ASGITransport(build_app(playing(), build_codec(), INFO), root_path=root)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        document = (await client.get(f"{root}/openapi.json")).json()
    assert document["servers"] == [{"url": root or "/"}]
    assert document["paths"] == API["paths"]


class Page(HTMLParser):
    """What a page would load or run, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href"):
                self.sources.append(value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_to_read_loads_nothing_and_tells_of_every_route() -> None:
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        answer = await client.get("/docs")
    page = Page()
    page.feed(answer.text)
    page.close()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert not page.open
    assert not {"script", "img", "link", "iframe"} & page.tags
    assert {source for source in page.sources if source != "openapi.json"} <= {f"#{name}" for name in page.ids}
    for path in API["paths"]:
        assert f"{path}</code></h2>" in answer.text
