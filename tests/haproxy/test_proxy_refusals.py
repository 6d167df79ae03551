"""What HAProxy refuses by itself, and in which words."""

import asyncio
from pathlib import Path

import pytest

from tests.api.fakes import playing
from tests.haproxy.proxied import SOON_S, api, error_of, proxied, request

WEBSOCKET = (
    b"GET /app/v1/completions HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: WebSocket\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (request()[0] + b'{"mod', 400, "bad_request"),
        (b"GET /other HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 404, "not_found"),
        (WEBSOCKET, 400, "bad_request"),
        (b"FETCH /app/health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 501, "not_implemented"),
    ],
    ids=["a body that never ends", "no application", "a WebSocket", "no method"],
)
async def test_what_haproxy_answers_by_itself_has_openais_form(
    tmp_path: Path, data: bytes, status: int, code: str
) -> None:
    async with proxied(api(playing()), tmp_path, is_impatient=True) as proxy:
        answer = await proxy.say(data)
    answered, error = error_of(answer)
    assert (answered, error["code"]) == (status, code)
    assert answer.count(b"x-request-id: ") == 1


async def test_what_never_becomes_a_request_is_refused_and_closed_in_haproxys_own_words(tmp_path: Path) -> None:
    """HAProxy 2.8 has these answers built in, and no setting changes them."""
    async with proxied(api(playing()), tmp_path, is_impatient=True) as proxy:
        for data, status in (
            (b"POST /app/v1/completions HTTP/1.1\r\nho", 408),
            (b"hello\r\n\r\n", 400),
            (b"GET /app/health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", 400),
            (b"GET /app/health HTTP/1.1\r\nhost: x\r\ncontent-length: abc\r\n\r\n", 400),
        ):
            assert (await proxy.say(data)).startswith(b"HTTP/1.1 %d " % status)


async def test_a_body_that_does_not_end_in_time_is_refused_by_the_api(tmp_path: Path) -> None:
    head, body = request()
    async with proxied(api(playing(), body_timeout_s=0.2), tmp_path) as proxy:
        reader, writer = await proxy.connect(head + body[:5])
        async with asyncio.timeout(SOON_S):
            # HAProxy keeps the connection for what is missing of the body.
            status, error = error_of(await reader.readuntil(b"}}"))
        writer.close()
    assert status == 408
    assert error["message"] == "the body was not complete after 0.2 s"


async def test_without_a_replica_the_answer_is_503_in_openais_form(tmp_path: Path) -> None:
    async with proxied(api(playing()), tmp_path) as proxy:
        await proxy.ask("disable server http-default/replica")
        answer = await proxy.say(b"GET /app/health HTTP/1.1\r\nhost: x\r\n\r\n")
    status, error = error_of(answer)
    assert (status, error["code"]) == (503, "service_unavailable")
