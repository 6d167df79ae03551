"""Clients note how each exchange ended: against a server that answers, refuses, breaks off and stays silent."""

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest

from tests.bench.chaos import load
from tests.bench.chaos.load import FOREIGN, Client, Ending, send_steadily
from tests.bench.chaos.probes import Call, Deck, build_probes

PROBES = build_probes(seed=1, num_probes=8)
CALL = Call(PROBES[0])
WHOLE_CALL = Call(PROBES[0], stream=False)


def event(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def tokens(*ids: int) -> bytes:
    return event({"choices": [{"token_ids": ids}]})


def stream(*frames: bytes, is_complete: bool = True) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(frame), frame) for frame in frames)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + chunks + (b"0\r\n\r\n" if is_complete else b"")


def answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


class ScriptedServer:
    """Answers every request with the same bytes, then closes the connection; while it is silent, once it is stopped."""

    def __init__(self) -> None:
        self.reply = b""
        self.is_silent = False
        self.num_requests = 0
        self.closes = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        assert self._server is not None
        self.closes.set()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        # Read to its end: closing on what is unread would reset the connection and take the reply along.
        await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
        self.num_requests += 1
        writer.write(self.reply)
        if self.is_silent:
            await self.closes.wait()
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[Client]:
    async with Client(await server.start(), "model") as client:
        yield client


async def test_a_stream_that_ends_properly_is_whole_with_all_its_tokens(server, client):
    server.reply = stream(tokens(1), tokens(2, 3), b"data: [DONE]\n\n")
    record = await client.send(CALL)
    assert (record.ending, record.token_ids, len(record.times_s)) == (Ending.WHOLE, [1, 2, 3], 2)
    assert client.records == [record]


async def test_an_answer_in_one_piece_is_whole(server, client):
    server.reply = answer(200, orjson.dumps({"choices": [{"token_ids": [1, 2]}]}))
    record = await client.send(WHOLE_CALL)
    assert (record.ending, record.token_ids) == (Ending.WHOLE, [1, 2])


async def test_an_error_is_noted_by_its_code_before_and_after_the_headers(server, client):
    error = {"error": {"message": "", "type": "server_error", "code": "engine_unavailable"}}
    server.reply = answer(503, orjson.dumps(error))
    record = await client.send(CALL)
    assert (record.ending, record.status, record.error) == (Ending.HTTP_ERROR, 503, "engine_unavailable")
    server.reply = stream(tokens(1), event(error))
    record = await client.send(CALL)
    assert (record.ending, record.error, record.token_ids) == (Ending.ERROR_EVENT, "engine_unavailable", [1])


async def test_an_error_that_a_proxy_wrote_is_told_from_those_of_the_service(server, client):
    server.reply = answer(502, b"<html>bad gateway</html>")
    assert (await client.send(CALL)).error == FOREIGN


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        stream(tokens(1), is_complete=False),
        stream(tokens(1)),
    ],
    ids=["no headers", "cut", "ended without [DONE]"],
)
async def test_a_connection_that_ends_too_early_is_an_error_of_the_connection(server, client, reply):
    server.reply = reply
    assert (await client.send(CALL)).ending is Ending.CONNECTION


async def test_nobody_there_is_an_error_of_the_connection(server, client):
    server.stop()
    assert (await client.send(CALL)).ending is Ending.CONNECTION


async def test_a_client_leaves_when_planned_and_keeps_what_it_got(server, client):
    server.reply, server.is_silent = stream(tokens(1), is_complete=False), True
    leaves_after_s = 0.2
    while not (record := await client.send(Call(PROBES[0], leaves_after_s=leaves_after_s))).token_ids:
        assert record.ending is Ending.LEFT
        leaves_after_s *= 2  # a busy machine has brought it nothing yet
    assert (record.ending, record.token_ids) == (Ending.LEFT, [1])


async def test_silence_is_no_answer_after_the_bound(server, client, monkeypatch):
    monkeypatch.setattr(load, "ANSWER_TIMEOUT_S", 0.2)
    server.is_silent = True
    record = await client.send(CALL)
    assert record.ending is Ending.NO_ANSWER
    assert record.end_s is not None


async def test_a_steady_load_asks_on_without_waiting_for_answers_and_ends_with_all_ended(server, client):
    server.is_silent = True
    ended = asyncio.Event()
    deck = Deck(PROBES, seed=1, leave_share=0.5, leave_within_s=0.3)
    task = asyncio.create_task(send_steadily(client, deck, rate=100.0, seed=1, ended=ended))
    while server.num_requests < 10:
        await client.next_stream(timeout_s=1.0)
    ended.set()
    server.closes.set()
    await task
    assert all(record.end_s is not None for record in client.records)
    assert len(client.records) >= 10


def test_a_deck_asks_for_every_probe_before_any_twice():
    deck = Deck(PROBES, seed=1)
    for _ in range(3):
        assert {deck.draw().probe.number for _ in PROBES} == set(range(len(PROBES)))


@pytest.mark.parametrize("leave_share", [0.0, 0.25, 1.0])
def test_a_deck_has_its_share_of_clients_leave_within_their_time(leave_share):
    deck = Deck(PROBES, seed=1, leave_share=leave_share, leave_within_s=0.3)
    leaves = [left for call in (deck.draw() for _ in range(1000)) if (left := call.leaves_after_s) is not None]
    assert len(leaves) / 1000 == pytest.approx(leave_share, abs=0.05)
    assert all(0 <= left <= 0.3 for left in leaves)


def test_probes_are_the_same_for_the_same_seed_greedy_and_sampled_in_turn():
    assert build_probes(1, 8) == PROBES != build_probes(2, 8)
    assert [probe.temperature > 0 for probe in PROBES] == [False, True] * 4
