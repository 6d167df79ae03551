"""A client that stops reading is dropped past a bound, hears why if it comes back, and costs nobody else anything."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio

from deployments.api import exchange
from deployments.api.http import build_app
from deployments.api.observer import Outcome
from deployments.messages import GenerateRequest, TokenOutput
from deployments.tokens.receiver import TokenReceiver, TokenStream
from tests.api.fakes import INFO, FakeTicket, Recorder, build_codec, client_at, serving
from tests.waiting import PATIENCE_S, until

MAX_UNREAD_TOKENS = 500


class Fountain:
    """A backend that never runs dry: each request gets tokens as fast as the loop turns, read or not."""

    def __init__(self) -> None:
        self.tokens = TokenReceiver(MAX_UNREAD_TOKENS)
        self.overflowed: set[str] = set()
        self.num_pushed = 0

    async def admit(self, requests: Sequence[GenerateRequest], key: bytes) -> FakeTicket:
        return FakeTicket()

    def generate(
        self,
        request: GenerateRequest,
        on_overflow: Callable[[], None],
        on_receipt: Any = None,
        *,
        holds_last: bool = True,
    ) -> TokenStream:
        def overflow() -> None:
            self.overflowed.add(request.request_id)
            pump.cancel()
            on_overflow()

        def close(stream: TokenStream) -> None:
            pump.cancel()

        stream = self.tokens.open(request.request_id, overflow, close)
        pump = asyncio.create_task(self._pump(stream))
        return stream

    async def _pump(self, stream: TokenStream) -> None:
        index = 0
        while True:
            stream.push(TokenOutput(stream.request_id, index, (ord("a") + index % 26,) * 100))
            index += 100
            self.num_pushed += 100
            await asyncio.sleep(0)

    async def health(self) -> tuple[bool, str]:
        return True, ""

    async def metrics(self) -> bytes:
        return b""

    async def live(self) -> Mapping[str, object]:
        return {}


@pytest_asyncio.fixture
async def fountain() -> Fountain:
    return Fountain()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest_asyncio.fixture
async def url(fountain: Fountain, recorder: Recorder) -> AsyncIterator[str]:
    info = INFO.__class__(INFO.name, "", 10_000_000, INFO.vocab_size, ())
    async with serving(build_app(fountain, build_codec(), info, observer=recorder)) as url:
        yield url


def body(max_tokens: int = 5_000_000) -> bytes:
    return orjson.dumps({"model": INFO.name, "prompt": "hello", "max_tokens": max_tokens, "stream": True})


class DeafClient:
    """Sends a request on a socket with the smallest buffer and reads only when it is told to."""

    def __init__(self, url: str) -> None:
        self._address = httpx.URL(url)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)

    async def ask(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, (self._address.host, self._address.port))
        data = body()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        await loop.sock_sendall(self.socket, head.encode() + data)

    async def read_to_the_end(self) -> bytes:
        loop, read = asyncio.get_running_loop(), bytearray()
        while not read.endswith(b"0\r\n\r\n") and (data := await loop.sock_recv(self.socket, 65536)):
            read += data
        return bytes(read)


async def test_it_is_dropped_and_forgotten(
    url: str, fountain: Fountain, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LAST_WORDS_S", 0.2)
    client = DeafClient(url)
    await client.ask()
    await until(lambda: bool(fountain.overflowed))
    async with asyncio.timeout(PATIENCE_S):
        await recorder.has_finished.wait()
    assert recorder.outcomes == [Outcome.STALLED]
    assert fountain.tokens.num_streams == 0
    client.socket.close()


async def test_it_hears_why_if_it_reads_again_in_time(
    url: str, fountain: Fountain, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LAST_WORDS_S", PATIENCE_S)
    client = DeafClient(url)
    await client.ask()
    await until(lambda: bool(fountain.overflowed))
    pushed = fountain.num_pushed
    async with asyncio.timeout(PATIENCE_S):
        received = await client.read_to_the_end()
        await recorder.has_finished.wait()
    assert fountain.num_pushed == pushed, "the request ended when the bound was reached"
    last = received[received.rindex(b"data: ") + 6 :].split(b"\n\n")[0]
    error = orjson.loads(last)["error"]
    assert error["code"] == "client_too_slow"
    assert f"more than {MAX_UNREAD_TOKENS} tokens" in error["message"]
    assert recorder.outcomes == [Outcome.STALLED]
    client.socket.close()


async def test_another_client_reads_on(url: str, fountain: Fountain) -> None:
    deaf = DeafClient(url)
    await deaf.ask()
    await until(lambda: bool(fountain.overflowed))
    async with client_at(url) as client, client.stream("POST", "/v1/completions", content=body()) as stream:
        num_read = 0
        async for line in stream.aiter_lines():
            num_read += len(line)
            if num_read > 1_000_000:
                break
    assert len(fountain.overflowed) == 1
    deaf.socket.close()
