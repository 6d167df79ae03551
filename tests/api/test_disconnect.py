"""Clients that leave a real server: their requests end at the backend at once, whatever they were waiting for."""

import asyncio
from typing import Any

import httpx
import orjson
import pytest

from deployments.api.http import build_app
from deployments.api.observer import Outcome
from deployments.messages import FinishReason
from tests.api.fakes import INFO, FakeBackend, Hang, Recorder, Step, build_codec, client_at, playing, serving
from tests.waiting import PATIENCE_S

WAITING: list[Step] = [Hang()]
SPEAKING: list[Step] = ["a", "b", Hang()]


async def open_and_leave(url: str, body: dict[str, Any], backend: FakeBackend, num_running: int) -> None:
    """Send a request over a bare socket, wait until the backend is at work, and close."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = orjson.dumps({"model": INFO.name} | body)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    await backend.until(lambda: len(backend.running) == num_running)
    if body.get("stream") and "b" in backend.script(backend.requests[0]):
        await reader.readuntil(b'"text":"b"')
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("steps", [WAITING, SPEAKING], ids=["before the first token", "after it"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"]])
async def test_leaving_ends_every_request_of_the_call(steps: list[Step], stream: bool, prompts: list[str]):
    backend, recorder = playing(*steps), Recorder()
    async with serving(build_app(backend, build_codec(), INFO, observer=recorder)) as url:
        await open_and_leave(url, {"prompt": prompts, "stream": stream}, backend, len(prompts))
        await backend.until(lambda: not backend.running)
    assert len(backend.requests) == len(prompts)
    assert recorder.outcomes == [Outcome.ABORTED]


async def test_leaving_does_not_touch_another_call():
    release = asyncio.Event()
    backend = FakeBackend(lambda r: [Hang()] if r.prompt_token_ids == (97,) else [release, "fine", FinishReason.LENGTH])
    async with serving(build_app(backend, build_codec(), INFO)) as url, client_at(url) as client:
        staying = asyncio.create_task(client.post("/v1/completions", json={"model": INFO.name, "prompt": "b"}))
        await backend.until(lambda: len(backend.running) == 1)
        await open_and_leave(url, {"prompt": "a"}, backend, num_running=2)
        await backend.until(lambda: len(backend.running) == 1)
        release.set()
        assert (await staying).json()["choices"][0]["text"] == "fine"


async def test_leaving_while_the_body_is_sent_reaches_no_backend():
    backend, recorder = playing("a", FinishReason.LENGTH), Recorder()
    async with serving(build_app(backend, build_codec(), INFO, observer=recorder)) as url:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await recorder.has_started.wait()
        writer.close()
        async with asyncio.timeout(PATIENCE_S):
            await recorder.has_finished.wait()
    assert recorder.outcomes == [Outcome.ABORTED]
    assert not backend.requests


async def test_a_connection_serves_the_next_request_after_a_stream():
    backend = playing("a", FinishReason.LENGTH)
    limits = httpx.Limits(max_connections=1)
    async with (
        serving(build_app(backend, build_codec(), INFO)) as url,
        client_at(url, limits=limits) as client,
    ):
        for stream in (True, False, True):
            answer = await client.post("/v1/completions", json={"model": INFO.name, "prompt": "a", "stream": stream})
            assert answer.status_code == 200


async def test_a_body_over_the_limit_is_refused_by_a_real_server():
    app = build_app(playing(), build_codec(), INFO, max_body_bytes=1000)
    async with serving(app) as url, client_at(url) as client:
        answer = await client.post("/v1/completions", content=b" " * 1001)
        assert answer.status_code == 413
        assert (await client.get("/health")).status_code == 200
