"""Clients that leave, wait, or say nothing more, through HAProxy."""

import asyncio
from pathlib import Path

import httpx
import openai
import pytest

from deployments.messages import FinishReason
from tests.api.fakes import INFO, FakeBackend, Hang, Step, playing
from tests.haproxy.proxied import (
    CLIENT_TIMEOUT_S,
    HEADERS_TIMEOUT_S,
    SOON_S,
    api,
    error_of,
    proxied,
    request,
)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_clients_that_leave_end_their_requests(tmp_path: Path, stream: bool) -> None:
    backend = playing(Hang())
    head, body = request(stream=stream)

    async def ask(apart_s: float) -> asyncio.StreamWriter:
        _, writer = await proxy.connect(head if apart_s else head + body)
        if apart_s:
            await asyncio.sleep(apart_s)
            writer.write(body)
        return writer

    async with proxied(api(backend), tmp_path) as proxy:
        for apart_s, num_clients in ((0, 1), (0, 16), (0.005, 1), (0.005, 16)):
            writers = await asyncio.gather(*(ask(apart_s) for _ in range(num_clients)))
            await backend.until(lambda: len(backend.running) == num_clients, SOON_S)  # noqa: B023
            for writer in writers:
                writer.close()
            await backend.until(lambda: not backend.running, SOON_S)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Of HTTP/2 (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def post_of_http2(stream: int, path: bytes, body: bytes) -> bytes:
    """A request's HEADERS and DATA; names by their place in HPACK's static table (RFC 7541, appendix A)."""

    def named(place: bytes, value: bytes) -> bytes:
        return place + bytes([len(value)]) + value

    method_and_scheme = b"\x83\x86"
    headers = method_and_scheme + named(b"\x04", path) + named(b"\x01", b"x") + named(b"\x0f\x10", b"application/json")
    return frame(1, 4, stream, headers) + frame(0, 1, stream, body)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_http2_is_understood_and_each_request_that_is_reset_ends(tmp_path: Path, stream: bool) -> None:
    backend = playing(Hang())
    _, body = request(stream=stream)
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    async with proxied(api(backend), tmp_path) as proxy:
        _, writer = await proxy.connect(begin)
        for number in (1, 3, 5):
            writer.write(post_of_http2(number, b"/app/v1/completions", body))
        await backend.until(lambda: len(backend.running) == 3, SOON_S)
        for num_left, number in ((2, 3), (1, 1), (0, 5)):
            cancelled = (8).to_bytes(4, "big")
            writer.write(frame(3, 0, number, cancelled))
            await backend.until(lambda: len(backend.running) == num_left, SOON_S)  # noqa: B023
        writer.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_openais_client_that_has_no_patience_ends_its_request(tmp_path: Path, stream: bool) -> None:
    backend, patience_s = playing(Hang()), 0.5
    async with (
        proxied(api(backend), tmp_path) as proxy,
        openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client,
    ):
        while not backend.requests:  # on a busy machine it takes longer than that to get there
            with pytest.raises(openai.APITimeoutError):
                asked = client.with_options(timeout=patience_s).completions
                await asked.create(model=INFO.name, prompt="abc", stream=stream)
            patience_s *= 2
        await backend.until(lambda: not backend.running, SOON_S)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_may_wait_in_silence_for_longer_than_it_may_be_idle(tmp_path: Path, stream: bool) -> None:
    release = asyncio.Event()
    steps: list[Step] = ["a", release, "b", FinishReason.LENGTH] if stream else [release, "ab", FinishReason.LENGTH]
    backend = playing(*steps)
    async with (
        proxied(api(backend), tmp_path, is_impatient=True) as proxy,
        httpx.AsyncClient(timeout=SOON_S) as client,
    ):
        body = {"model": INFO.name, "prompt": "abc", "stream": stream}
        pending = asyncio.create_task(client.post(f"{proxy.url}/v1/completions", json=body))
        await backend.until(lambda: len(backend.running) == 1, SOON_S)
        await asyncio.sleep(1.5 * max(CLIENT_TIMEOUT_S, HEADERS_TIMEOUT_S))  # what is tested is that nothing happens
        release.set()
        answer = await pending
    assert answer.status_code == 200
    assert answer.text.count('"finish_reason":"length"') == 1


async def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path: Path) -> None:
    async with proxied(api(playing()), tmp_path, is_impatient=True) as proxy:
        assert await proxy.say(b"") == b""


async def test_a_connection_that_says_nothing_after_an_answer_is_closed(tmp_path: Path) -> None:
    async with proxied(api(playing("a", FinishReason.LENGTH)), tmp_path) as proxy:
        answer = await proxy.say(b"".join(request()))
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1 ") == 1


async def test_a_client_that_closes_its_sending_half_counts_as_one_that_left(tmp_path: Path) -> None:
    """Clients that leave and those that only have nothing more to say look the same to HAProxy; see the next test."""
    backend = playing(Hang())
    async with proxied(api(backend), tmp_path) as proxy:
        reader, writer = await proxy.connect(b"".join(request()))
        await backend.until(lambda: len(backend.running) == 1, SOON_S)
        writer.write_eof()
        async with asyncio.timeout(SOON_S):
            status, error = error_of(await reader.read())
        await backend.until(lambda: not backend.running, SOON_S)
        writer.close()
    assert status == 400
    assert "sending half" in error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_haproxy_answers_who_closed_its_sending_half_only_if_it_does_not_notice_who_leaves(
    tmp_path: Path, stream: bool
) -> None:
    """Why `option abortonclose` stays: there is nothing between. Where this fails, HAProxy has learned to tell them."""
    release = asyncio.Event()
    backend = FakeBackend(
        lambda asked: (
            ("a", FinishReason.LENGTH) if asked.sampling.max_tokens == 1 else (release, "ab", FinishReason.LENGTH)
        )
    )
    async with proxied(api(backend), tmp_path, without="abortonclose") as proxy:
        reader, writer = await proxy.connect(b"".join(request(stream=stream)))
        await backend.until(lambda: len(backend.running) == 1, SOON_S)
        writer.write_eof()
        await proxy.say(b"".join(request(max_tokens=1)))  # so HAProxy has seen what was said before
        release.set()
        async with asyncio.timeout(SOON_S):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 ") and b'"finish_reason":"length"' in answer
        writer.close()

        release.clear()
        _, writer = await proxy.connect(b"".join(request(stream=stream)))
        await backend.until(lambda: len(backend.running) == 1, SOON_S)
        writer.close()
        await proxy.say(b"".join(request(max_tokens=1)))
        assert len(backend.running) == 1
        release.set()
        await backend.until(lambda: not backend.running, SOON_S)
