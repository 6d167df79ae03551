"""OpenAI's own client against a real server over a scripted backend."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from deployments.api.http import build_app
from deployments.errors import EngineDeadError, OverloadedError
from deployments.messages import FinishReason
from tests.api.fakes import END_ID, INFO, FakeBackend, Hang, Step, build_codec, playing, serving

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP


@asynccontextmanager
async def client_for(backend: FakeBackend, max_retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(build_app(backend, build_codec(), INFO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=max_retries) as client,
    ):
        yield client


async def test_completion():
    async with client_for(playing("Hel", "lo 👋", [END_ID], STOP)) as client:
        answer = await client.completions.create(model=INFO.name, prompt="abc", seed=1, stop=["zz"])
    assert answer.choices[0].text == "Hello 👋"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 11
    assert answer._request_id is not None and answer.id == f"cmpl-{answer._request_id}"


async def test_chat_completion_can_be_continued_with_its_own_message():
    backend = playing("Hi", LENGTH)
    async with client_for(backend) as client:
        first = await client.chat.completions.create(
            model=INFO.name, messages=[{"role": "user", "content": "a"}], max_completion_tokens=2
        )
        history: list[Any] = [
            {"role": "user", "content": "a"},
            first.choices[0].message,
            {"role": "user", "content": "b"},
        ]
        await client.chat.completions.create(model=INFO.name, messages=history, max_completion_tokens=2)
    assert bytes(backend.requests[1].prompt_token_ids) == b"u:a;a:Hi;u:b;a:"


async def test_completion_stream():
    async with client_for(playing("a", "bc", "d", LENGTH)) as client:
        stream = await client.completions.create(model=INFO.name, prompt="x", stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcd"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]


async def test_chat_stream_with_usage():
    async with client_for(playing(*(bytes([byte]) for byte in "né 👋".encode()), [END_ID], STOP)) as client:
        stream = await client.chat.completions.create(
            model=INFO.name,
            messages=[{"role": "user", "content": "a"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas] == ["", "n", "é", " ", "👋", None]
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (6, 9)
    assert not chunks[-1].choices


async def test_tokens_arrive_while_the_backend_is_still_at_work():
    release = asyncio.Event()
    async with client_for(playing("a", release, "b", LENGTH)) as client:
        stream = await client.completions.create(model=INFO.name, prompt="x", stream=True)
        assert (await anext(stream)).choices[0].text == "a"
        release.set()
        assert (await anext(stream)).choices[0].text == "b"


async def test_closing_a_stream_ends_the_request():
    backend = playing("a", Hang())
    async with client_for(backend) as client:
        stream = await client.completions.create(model=INFO.name, prompt="x", stream=True)
        await anext(stream)
        await stream.close()
        await backend.until(lambda: not backend.running)


async def test_errors_are_the_clients_own_classes():
    async with client_for(playing(OverloadedError("full"))) as client:
        with pytest.raises(openai.RateLimitError, match="full") as limited:
            await client.completions.create(model=INFO.name, prompt="x", stream=True)
        assert limited.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-9", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=INFO.name, prompt="x", temperature=3)
        assert bad.value.param == "temperature"


async def test_an_overloaded_answer_is_retried():
    attempts: Iterator[list[Step]] = iter([[OverloadedError("full")], ["fine", LENGTH]])
    async with client_for(FakeBackend(lambda _: next(attempts)), max_retries=1) as client:
        answer = await client.completions.create(model=INFO.name, prompt="x")
    assert answer.choices[0].text == "fine"


async def test_an_error_within_a_stream_is_raised():
    async with client_for(playing("a", EngineDeadError("dead"))) as client:
        stream = await client.completions.create(model=INFO.name, prompt="x", stream=True)
        assert (await anext(stream)).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="dead"):
            await anext(stream)


async def test_models():
    async with client_for(playing()) as client:
        assert [model.id async for model in client.models.list()] == [INFO.name]
        assert (await client.models.retrieve(INFO.name)).id == INFO.name
