"""The id of a request: the caller's where it gave a good one, and never that by which engines tell calls apart."""

import asyncio

import pytest

from deployments.api.http import build_app
from deployments.messages import FinishReason
from tests.api.fakes import INFO, Recorder, build_codec, client_of, playing, serving
from tests.call_lines import kept_lines, logging_observer
from tests.waiting import PATIENCE_S, until

BODY = {"model": INFO.name, "prompt": "abc"}


@pytest.mark.parametrize("named", ["job-7/Root=1", "a" * 128])
async def test_the_callers_id_comes_back_once(named: str) -> None:
    async with client_of(build_app(playing("a", FinishReason.LENGTH), build_codec(), INFO)) as client:
        for answer in (
            await client.post("/v1/completions", json=BODY, headers={"x-request-id": named}),
            await client.get("/nowhere", headers={"x-request-id": named}),
        ):
            assert answer.headers.get_list("x-request-id") == [named]


@pytest.mark.parametrize("named", ["", "a" * 129, "two words", 'no "quotes"', "a,b"])
async def test_an_id_that_is_not_well_formed_is_replaced(named: str) -> None:
    async with client_of(build_app(playing("a", FinishReason.LENGTH), build_codec(), INFO)) as client:
        answer = await client.post("/v1/completions", json=BODY, headers={"x-request-id": named})
    (request_id,) = answer.headers.get_list("x-request-id")
    assert answer.json()["id"] == f"cmpl-{request_id}"


async def test_a_server_that_sends_the_id_sends_it_alone() -> None:
    app = build_app(playing(RuntimeError("a 500")), build_codec(), INFO, server_sends_ids=True)
    async with client_of(app) as client:
        for path in ("/v1/models", "/nowhere"):
            assert "x-request-id" not in (await client.get(path)).headers
        assert "x-request-id" not in (await client.post("/v1/completions", json=BODY)).headers


async def test_two_calls_of_one_id_are_told_apart_and_both_logged_by_it() -> None:
    backend = playing("a", FinishReason.LENGTH)
    app = build_app(backend, build_codec(), INFO, observer=logging_observer())
    with kept_lines() as kept:
        async with client_of(app) as client:
            ids = [
                (await client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine"})).json()["id"]
                for _ in range(2)
            ]
        await until(lambda: len(kept) == 2)
    assert ids[0] != ids[1]
    assert {request.request_id.rpartition("-")[0] for request in backend.requests} == set(ids)
    lines = [record.getMessage() for record in kept]
    assert all(f"call={one} " in line and "request_id=mine" in line for one, line in zip(ids, lines, strict=True))


async def test_a_body_that_does_not_end_in_time_is_refused() -> None:
    recorder = Recorder()
    app = build_app(playing(), build_codec(), INFO, observer=recorder, body_timeout_s=0.1)
    async with serving(app) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        async with asyncio.timeout(PATIENCE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readuntil(b"}}")
        writer.close()
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"the body was not complete after 0.1 s" in body
    assert [outcome.value for outcome in recorder.outcomes] == ["stalled"]
