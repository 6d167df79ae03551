"""Pools shrink under load: who is removed takes nothing new, what it holds ends well, and clients see only time."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from tests.bench.chaos import load
from tests.bench.chaos.load import Client, Ending, Record
from tests.bench.chaos.probes import Call, Probe, build_probes
from tests.e2e.conftest import MODEL_NAME, PREFILL_SHUTDOWN_S, Scaled, Service
from tests.e2e.waiting import wait_for_a_reading, wait_idle
from tests.waiting import stop_process, wait_until

# Long enough to be handed over, and to be at work yet when both decode engines are told to stop.
PROMPT_TOKENS, MAX_TOKENS = (100, 400), (500, 600)
VOCAB_SIZE = 256
# So many that none is left without one, whichever replica the hash of each prompt prefers.
NUM_PROBES = 16
# What Serve takes to tell a replica to go, and to see that it has, on a busy machine.
PATIENCE_S = 240.0
RESUMED = "kvrelay_requests_resumed_total"


def build_small_probes() -> list[Probe]:
    probes = build_probes(3, NUM_PROBES, PROMPT_TOKENS, MAX_TOKENS)
    return [replace(probe, prompt=tuple(token % VOCAB_SIZE for token in probe.prompt)) for probe in probes]


def every_replica_decodes(service: Service) -> bool:
    return all(row.engine.num_running for row in service.stats("Decode"))


async def ask(service: Service, probes: list[Probe], disturb: Callable[[], None] | None = None) -> list[Record]:
    """Stream every probe at once; `disturb` when half of them have tokens, and every decode replica has some."""
    async with Client(service.url, MODEL_NAME) as client:
        streams = [asyncio.create_task(client.send(Call(probe))) for probe in probes]
        if disturb is not None:
            while sum(bool(record.token_ids) for record in client.records) < NUM_PROBES / 2 or not (
                await asyncio.to_thread(every_replica_decodes, service)
            ):
                assert not all(stream.done() for stream in streams)
                await asyncio.sleep(0.001)
            await asyncio.to_thread(disturb)
        return [await stream for stream in streams]


def test_pools_that_shrink_lose_no_request_and_no_token(scaled: Scaled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "ANSWER_TIMEOUT_S", 2 * PATIENCE_S)  # engines are stopped meanwhile
    service = scaled.service
    scaled.wait_for_two()
    wait_for_a_reading(service)  # so that both replicas of each pool get requests
    probes = build_small_probes()
    expected = {record.call.probe.number: record.token_ids for record in asyncio.run(ask(service, probes))}
    wait_idle(service, 120)
    before = service.metric(RESUMED)
    engines = [info.pid for info in service.pool("Decode").broadcast("engine_info").results(timeout_s=30)]
    begun: list[float] = []

    def shrink() -> None:
        """With engines that do not work meanwhile: what the removed replica has to do, it cannot do in its time."""
        for pid in engines:
            stop_process(pid)
        try:
            begun.append(time.monotonic())
            scaled.scale(1)
            wait_until(lambda: scaled.num_replicas("Decode") <= 1, PATIENCE_S)
        finally:
            for pid in engines:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    records = asyncio.run(ask(service, probes, shrink))
    assert {record.ending for record in records} == {Ending.WHOLE}, [record.error for record in records]
    assert {record.call.probe.number: record.token_ids for record in records} == expected
    assert service.metric(RESUMED) > before, "the removed decode replica had more to do than its time allowed"
    wait_until(lambda: scaled.num_replicas("Prefill") <= 1, begun[0] + PREFILL_SHUTDOWN_S - time.monotonic())
    wait_idle(service, 120)
