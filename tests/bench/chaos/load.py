"""Clients of the service: they send probes, and note whatever comes back, and when.

Knows HTTP and the shapes of the API, not what the service is made of. Judges nothing: `verdict.py` does.
"""

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import httpx

from tests.bench.chaos.probes import Call, Deck

# Generous: the longest probe takes a few seconds where nothing is wrong.
ANSWER_TIMEOUT_S = 120.0
# The error of an answer that is not in the API's shape; a proxy wrote it.
FOREIGN = "not from the service"


class Ending(StrEnum):
    """How an exchange ended, as the client sees it."""

    WHOLE = "whole"
    LEFT = "client left"
    HTTP_ERROR = "HTTP error"
    ERROR_EVENT = "error event"
    CONNECTION = "connection error"
    NO_ANSWER = "no answer"


@dataclass(slots=True)
class Record:
    """One request, as its client saw it.

    Attributes:
        call: what was sent.
        sent_s: when; all times are of the system's monotonic clock.
        token_ids: those that came.
        times_s: when each event with tokens came; of a whole answer, when it was there.
        status: of HTTP; None: no headers came.
        error: code of the error, or name of what the connection met.
        ending: how it ended; `NO_ANSWER` until it has.
        end_s: when it ended.
    """

    call: Call
    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    status: int | None = None
    error: str | None = None
    ending: Ending = Ending.NO_ANSWER
    end_s: float | None = None

    def add_tokens(self, answer: dict[str, Any]) -> None:
        """Note the tokens of an answer or of one event."""
        for choice in answer["choices"]:
            self.token_ids += choice["token_ids"]
            self.times_s.append(time.monotonic())

    def fail(self, ending: Ending, error: str) -> None:
        self.ending, self.error = ending, error


class Client:
    """Sends requests, each on a connection of its own, and keeps a record of every one.

    Args:
        url: of the service, without `/v1`.
        model: its name in the API.
    """

    def __init__(self, url: str, model: str) -> None:
        self.records: list[Record] = []
        self._url = f"{url}/v1/completions"
        self._model = model
        self._stream_asked = asyncio.Event()
        # A connection of its own: what happens to one request's says nothing of another's.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def next_stream(self, timeout_s: float) -> None:
        """Return when the next stream is asked for, or after so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stream_asked.wait(), timeout_s)

    async def send(self, call: Call) -> Record:
        """Send one request and return when it has ended, however; at the latest after `ANSWER_TIMEOUT_S`."""
        record = Record(call, time.monotonic())
        self.records.append(record)
        if call.stream:
            self._stream_asked.set()  # wakes all who wait now, and nobody later
            self._stream_asked.clear()
        leaves_after_s = call.leaves_after_s
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S if leaves_after_s is None else leaves_after_s):
                await self._exchange(record)
        except TimeoutError:
            record.ending = Ending.NO_ANSWER if leaves_after_s is None else Ending.LEFT
        except httpx.TransportError as error:
            record.fail(Ending.CONNECTION, type(error).__name__)
        record.end_s = time.monotonic()
        return record

    async def send_all(self, calls: Iterable[Call], num_clients: int) -> list[Record]:
        """Send requests from so many clients at once, each taking the next when its last has ended."""
        queue = iter(calls)

        async def work() -> list[Record]:
            return [await self.send(call) for call in queue]

        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(work()) for _ in range(num_clients)]
        return [record for client in clients for record in client.result()]

    async def _exchange(self, record: Record) -> None:
        body = record.call.probe.body(self._model, record.call.stream)
        async with self._http.stream("POST", self._url, json=body) as response:
            record.status = response.status_code
            if response.status_code != httpx.codes.OK:
                record.fail(Ending.HTTP_ERROR, _error_code(await response.aread()))
            elif record.call.stream:
                await _read_events(record, response)
            else:
                record.add_tokens(json.loads(await response.aread()))
                record.ending = Ending.WHOLE


async def _read_events(record: Record, response: httpx.Response) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            record.ending = Ending.WHOLE
        elif "error" in (event := json.loads(data)):
            record.fail(Ending.ERROR_EVENT, str(event["error"]["code"]))
        else:
            record.add_tokens(event)
    if record.ending is Ending.NO_ANSWER:
        record.fail(Ending.CONNECTION, "ended without [DONE]")


def _error_code(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["code"] or error["type"])
    except (ValueError, KeyError, TypeError):
        return FOREIGN


async def send_steadily(client: Client, deck: Deck, rate: float, seed: int, ended: asyncio.Event) -> None:
    """Send `rate` requests per second, answered or not, until the event is set; return when all have ended.

    Each comes at a random place in its own interval, so that the load is steady and its requests still meet.
    """
    rng, started_s = random.Random(seed), time.monotonic()
    async with asyncio.TaskGroup() as requests:
        for number in itertools.count():
            due_s = started_s + (number + rng.random()) / rate
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), max(0.0, due_s - time.monotonic()))
            if ended.is_set():
                return
            requests.create_task(client.send(deck.draw()))
