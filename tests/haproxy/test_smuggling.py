"""Where a request ends, and what stands behind it, through HAProxy."""

import asyncio
import contextlib
import re
from pathlib import Path

import pytest

from deployments.messages import FinishReason
from tests.api.ambiguous import AMBIGUOUS
from tests.api.fakes import FakeBackend, playing
from tests.haproxy.proxied import (
    SOON_S,
    api,
    proxied,
    request,
)

# HAProxy writes headers anew, in one form: it and the API read them alike, whatever they were.
REWRITTEN = ("a header that goes on in a second line", "a line break without a return")


async def test_requests_that_could_be_read_in_two_ways_are_refused_and_what_is_behind_them_is_not_answered(
    tmp_path: Path,
) -> None:
    backend = playing("a", FinishReason.LENGTH)
    async with proxied(api(backend), tmp_path) as proxy:
        for name, data in AMBIGUOUS.items():
            if name not in REWRITTEN:
                answer = await proxy.say(data.replace(b" /v1/", b" /app/v1/"))
                assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1, name
    assert not backend.calls


async def test_a_flood_of_headers_is_refused_unread(tmp_path: Path) -> None:
    async with proxied(api(playing()), tmp_path) as proxy:
        for count in (150, 20_000):
            headers = b"".join(b"x%d: a\r\n" % number for number in range(count))
            answer = await proxy.say(b"GET /app/health HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 400 ")


async def test_requests_that_are_sent_at_once_are_answered_in_turn(tmp_path: Path) -> None:
    backend = FakeBackend(lambda asked: (f"{asked.sampling.max_tokens}", FinishReason.LENGTH))
    *first, (head, body) = [request(max_tokens=number) for number in (1, 2, 3)]
    last = head.replace(b"host: x", b"host: x\r\nconnection: close") + body
    async with proxied(api(backend), tmp_path) as proxy:
        answer = await proxy.say(b"".join(head + body for head, body in first) + last)
    assert re.findall(rb'"text":"(.)"', answer) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("path", ["/app/nowhere", "/app/v1/models", "/app/v1/completions"])
async def test_a_body_that_goes_on_behind_its_answer_keeps_no_connection(tmp_path: Path, path: str) -> None:
    """A byte at a time would keep it for as long as the client likes."""
    method = "POST" if path.endswith("completions") else "GET"
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n".encode()
    async with proxied(api(playing(), body_timeout_s=0.2), tmp_path) as proxy:
        reader, writer = await proxy.connect(head)
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(SOON_S):
            with contextlib.suppress(ConnectionError):
                while not answer.done():
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.wait([answer], timeout=0.1)
                await answer
        writer.close()
