"""The routes that generate nothing: models, tokens, state and version."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from deployments.api.http import build_app
from deployments.api.text import TextCodec
from deployments.api.tokenization import detokenize, tokenize
from deployments.messages import FinishReason, ModelInfo
from tests.api.fakes import END_ID, INFO, FakeBackend, build_codec, build_tokenizer, client_of, playing

CODEC = build_codec()
TOOL = {"type": "function", "function": {"name": "f"}}
MESSAGES = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_for(
    backend: FakeBackend | None = None, codec: TextCodec = CODEC, info: ModelInfo = INFO, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(build_app(backend or playing(), codec, info, **options)) as client:
        yield client


async def post(path: str, **body: Any) -> httpx.Response:
    async with client_for() as client:
        return await client.post(path, json=body)


async def test_a_model_tells_how_long_its_context_is_and_where_it_comes_from() -> None:
    async with client_for(info=replace(INFO, root="owner/origin")) as client:
        (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == (INFO.name, "owner/origin", INFO.max_model_len)
    assert (model["object"], model["owned_by"], model["parent"]) == ("model", "kvrelay", None)


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "fake", "fake/model/x", "%00"])
async def test_a_model_that_is_not_served_is_404_in_openais_form(name: str) -> None:
    async with client_for() as client:
        answer = await client.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_a_prompt_is_encoded_as_completions_encode_it() -> None:
    answer = await post("/tokenize", model=INFO.name, prompt="né")
    assert answer.json() == {"count": 3, "max_model_len": INFO.max_model_len, "tokens": [*"né".encode()]}


async def test_tokens_come_as_the_vocabulary_writes_them_where_asked_for() -> None:
    answer = (await post("/tokenize", prompt="a b<end>", return_token_strs=True)).json()
    assert answer["token_strs"] == ["a", "Ġ", "b", "<end>"]
    assert answer["count"] == len(answer["tokens"]) == 4


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "u:hi;a:"),
        ({"add_generation_prompt": False}, "u:hi;"),
        ({"continue_final_message": True}, "u:hi"),
        ({"add_special_tokens": True}, "u:hi;a:"),
    ],
)
async def test_messages_are_encoded_as_chats_encode_them(fields: dict[str, Any], text: str) -> None:
    answer = await post("/tokenize", messages=MESSAGES, **fields)
    assert bytes(answer.json()["tokens"]).decode() == text


async def test_a_chat_template_is_told_what_a_chat_tells_it() -> None:
    codec = TextCodec(build_tokenizer("{{ tone }}:{{ messages[0].content }}"))
    body = {"messages": MESSAGES, "chat_template_kwargs": {"tone": "kind"}}
    async with client_for(codec=codec) as client:
        assert bytes((await client.post("/tokenize", json=body)).json()["tokens"]) == b"kind:hi"


async def test_a_text_that_is_longer_than_the_context_is_encoded_too() -> None:
    answer = (await post("/tokenize", prompt="a" * 1000)).json()
    assert answer["count"] == 1000 > answer["max_model_len"]


def test_special_tokens_are_added_unless_they_are_not_wanted() -> None:
    codec = build_codec()
    codec.backend.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", END_ID)])
    for wanted, expected in (("", [END_ID, 97]), (',"add_special_tokens":true', [END_ID, 97])):
        assert tokenize(f'{{"prompt":"a"{wanted}}}'.encode(), codec, INFO)["tokens"] == expected
    assert tokenize(b'{"prompt":"a","add_special_tokens":false}', codec, INFO)["tokens"] == [97]


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("/tokenize", {}, "prompt", "either prompt or messages"),
    ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt", "either prompt or messages"),
    ("/tokenize", {"prompt": ["a"]}, "prompt", "valid string"),
    ("/tokenize", {"messages": []}, "messages", "at least 1"),
    (
        "/tokenize",
        {"prompt": "a", "add_generation_prompt": True},
        "add_generation_prompt",
        "only allowed with messages",
    ),
    (
        "/tokenize",
        {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
        "cannot go with",
    ),
    ("/tokenize", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools.0.function", "required"),
    ("/tokenize", {"prompt": "a", "tools": [TOOL]}, "tools", "only allowed with messages"),
    ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template", "not supported yet"),
    ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "only allowed with"),
    ("/tokenize", {"prompt": "a" * 70_000}, "prompt", "too long"),
    ("/tokenize", {"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools here"),
    ("/detokenize", {}, "tokens", "required"),
    ("/detokenize", {"tokens": "a"}, "tokens", "valid list"),
    ("/detokenize", {"tokens": [1.5]}, "tokens.0", "valid integer"),
    ("/detokenize", {"tokens": [-1]}, "tokens.0", "greater than or equal to 0, got -1"),
    ("/detokenize", {"tokens": [257]}, "tokens", "0 to 256, got 257"),
    ("/detokenize", {"tokens": [2**63]}, "tokens", "0 to 256"),
    ("/detokenize", {"tokens": [1], "prompt": "x"}, "prompt", "unknown field"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), WRONG)
async def test_what_is_wrong_is_named(path: str, body: dict[str, Any], param: str, message: str) -> None:
    answer = await post(path, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


async def test_tokens_become_text_with_special_tokens_written_out() -> None:
    assert (await post("/detokenize", tokens=[*"né".encode(), 256])).json() == {"prompt": "né<end>"}
    assert (await post("/detokenize", tokens=[])).json() == {"prompt": ""}


@given(st.text())
def test_any_text_comes_back_as_it_was(text: str) -> None:
    tokens = tokenize(orjson.dumps({"prompt": text}), CODEC, replace(INFO, max_model_len=10_000))["tokens"]
    assert detokenize(orjson.dumps({"tokens": tokens}), CODEC, INFO) == {"prompt": text}


@pytest.mark.parametrize(("path", "fields"), [("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})])
async def test_another_model_is_404_and_none_is_the_one_that_is_served(path: str, fields: dict[str, Any]) -> None:
    async with client_for(playing("a", FinishReason.LENGTH)) as client:
        for model, status in ({"model": "other"}, 404), ({"model": None}, 200), ({}, 200), ({"model": INFO.name}, 200):
            answer = await client.post(path, json=fields | model)
            assert answer.status_code == status
        assert answer.json().get("model", INFO.name) == INFO.name


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_bodies_have_the_same_bounds_as_those_of_calls(path: str) -> None:
    async with client_for(max_body_bytes=1000) as client:
        assert (await client.post(path, content=b" " * 1001)).status_code == 413
        assert (await client.post(path, content=b"{}", headers={"content-type": "text/plain"})).status_code == 415
        assert (await client.post(path, content=b"{")).status_code == 400
        assert (await client.get(path)).status_code == 405


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_ping_is_the_health_without_words(method: str) -> None:
    backend = playing()
    async with client_for(backend) as client:
        answer = await client.request(method, "/ping")
        assert (answer.status_code, answer.content) == (200, b"")
        backend.healthy = (False, "no decode replica")
        answer = await client.request(method, "/ping")
        assert (answer.status_code, answer.content) == (503, b"")


async def test_the_version_is_that_of_the_package() -> None:
    async with client_for() as client:
        assert (await client.get("/version")).json() == {"version": version("kvrelay")}
