"""The pools are read one reading at a time, and a failed reading is told once."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deployments.engine.stats import EngineStats
from deployments.load.admission import DECODE, Admission, Bounds
from deployments.load.pool_watch import Read, watch_pools
from deployments.metrics import HandoffStats, ReplicaStats

READING = {DECODE: [ReplicaStats("d", EngineStats(num_queued_prompt_tokens=50), HandoffStats())]}
NOW_S = 1000.0


@asynccontextmanager
async def watching(read: Read) -> AsyncIterator[Admission]:
    admission = Admission(Bounds(1.0, 1000, None), lambda: NOW_S)
    task = asyncio.create_task(watch_pools(read, admission, period_s=0.0, clock=lambda: NOW_S))
    try:
        yield admission
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_reading_reaches_admission_and_the_next_one_waits_for_it() -> None:
    num_running, asked = 0, asyncio.Semaphore(0)

    async def read() -> dict[str, list[ReplicaStats]]:
        nonlocal num_running
        num_running += 1
        assert num_running == 1
        await asyncio.sleep(0)
        num_running -= 1
        asked.release()
        return READING

    async with watching(read) as admission:
        for _ in range(3):
            await asked.acquire()
    assert admission.outlook(DECODE).queued_tokens == 50


async def test_a_reading_is_as_old_as_the_oldest_number_in_it() -> None:
    asked = asyncio.Semaphore(0)

    async def read() -> dict[str, list[ReplicaStats]]:
        asked.release()
        return {DECODE: READING[DECODE] + [ReplicaStats("e", EngineStats(), HandoffStats(), age_s=4.0)]}

    async with watching(read) as admission:
        for _ in range(2):
            await asked.acquire()
    assert admission._decode.as_of_s == NOW_S - 4.0


async def test_a_failure_is_logged_once_and_the_watch_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    attempts, succeeded = itertools.count(), asyncio.Event()

    async def read() -> dict[str, list[ReplicaStats]]:
        if next(attempts) < 3:
            raise ConnectionError("no pool")
        succeeded.set()
        return READING

    async with watching(read):
        await succeeded.wait()
    assert caplog.text.count("cannot be read") == 1
