"""A client that costs little: notes what arrives when, and makes sense of it afterwards."""

import asyncio
import re
import socket
import time
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

_EVENT = re.compile(rb"data: (.*?)\n\n", re.DOTALL)


@dataclass
class Reply:
    """What came back on one connection.

    Attributes:
        sent_s: when the request was sent; all times are of the system's monotonic clock.
        pieces: arrival time and bytes of each read.
        done: set when the response is complete or the connection closed.
    """

    sent_s: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)

    def events(self) -> list[tuple[float, Any]]:
        """Arrival time and JSON of each event, `[DONE]` left out."""
        body, found = self.body, []
        ends, total = [], 0
        for at_s, data in self.pieces:
            total += len(data)
            ends.append((total, at_s))
        assert not body or body.startswith(b"HTTP/1.1 200"), body[:500]
        place = 0
        for match in _EVENT.finditer(body):
            while ends[place][0] < match.end():
                place += 1
            if match[1] != b"[DONE]":
                found.append((ends[place][1], orjson.loads(match[1])))
        return found

    def num_events_between(self, start_s: float, end_s: float) -> int:
        return sum(data.count(b"data: {") for at_s, data in self.pieces if start_s <= at_s < end_s)


class Connection(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes, reply: Reply) -> None:
        self._request = request
        self.reply = reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.reply.sent_s = time.monotonic()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.reply.pieces.append((time.monotonic(), data))
        # The last chunk, and not a header that ends with a 0.
        if data == b"0\r\n\r\n" or data.endswith(b"\r\n0\r\n\r\n"):
            self.reply.done.set()
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reply.done.set()


def encode_request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = orjson.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def completion(max_tokens: int, period_us: int, prompt: str = "Hello", **options: Any) -> dict[str, Any]:
    """A body for the paced engine, which takes the seed for its period."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": max_tokens, "seed": period_us, "stream": True}
    return body | options


async def post(port: int, body: dict[str, Any], path: str = "/v1/completions") -> Connection:
    """Send a request; its reply fills up in the background."""
    request = encode_request(body, path)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(request, Reply()), "127.0.0.1", port)
    return connection


def post_and_never_read(port: int, body: dict[str, Any]) -> socket.socket:
    """Send a request on a socket with the smallest receive buffer, and leave what comes there."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    sock.sendall(encode_request(body))
    return sock
