"""The pools are read one reading at a time, and a failed reading is told once."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deployments.engine.stats import EngineStats
from deployments.load.pool_watch import PoolWatch, Read
from deployments.load.reading import DECODE, Pools, Reading
from deployments.replica_stats import HandoffStats, ReplicaStats

ENGINE = EngineStats(num_queued_prompt_tokens=50)
POOLS: Pools = {DECODE: [ReplicaStats("d", ENGINE, HandoffStats())]}
NOW_S = 1000.0


@asynccontextmanager
async def watching(read: Read) -> AsyncIterator[list[Reading]]:
    told: list[Reading] = []
    task = asyncio.create_task(PoolWatch(read, told.append, period_s=0.0, min_pause_s=0.0, clock=lambda: NOW_S).run())
    try:
        yield told
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_each_reading_is_told_and_the_next_one_waits_for_it() -> None:
    num_running, asked = 0, asyncio.Semaphore(0)

    async def read() -> Pools:
        nonlocal num_running
        num_running += 1
        assert num_running == 1
        await asyncio.sleep(0)
        num_running -= 1
        asked.release()
        return POOLS

    async with watching(read) as told:
        for _ in range(3):
            await asked.acquire()
    assert told[:2] == [Reading({DECODE: {"d": ENGINE}}, NOW_S)] * 2


async def test_a_reading_is_as_old_as_the_oldest_number_in_it() -> None:
    asked = asyncio.Semaphore(0)

    async def read() -> Pools:
        asked.release()
        return {DECODE: [*POOLS[DECODE], ReplicaStats("e", EngineStats(), HandoffStats(), age_s=4.0)]}

    async with watching(read) as told:
        for _ in range(2):
            await asked.acquire()
    assert told[0].as_of_s == NOW_S - 4.0


async def test_a_failure_is_logged_once_and_the_watch_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    attempts, succeeded = itertools.count(), asyncio.Event()

    async def read() -> Pools:
        if next(attempts) < 3:
            raise ConnectionError("no pool")
        succeeded.set()
        return POOLS

    async with watching(read):
        await succeeded.wait()
    assert caplog.text.count("cannot be read") == 1


async def test_a_reading_that_is_asked_for_does_not_wait_for_its_turn() -> None:
    told: list[Reading] = []

    async def read() -> Pools:
        return POOLS

    watch = PoolWatch(read, told.append, period_s=3600.0, min_pause_s=0.0)
    running = asyncio.create_task(watch.run())
    try:
        assert await watch.refresh(60.0)
        num_told = len(told)
        assert all(await asyncio.gather(*[watch.refresh(60.0) for _ in range(8)]))
        assert len(told) <= num_told + 2  # one that was under way when some of them asked, and one for the rest
    finally:
        running.cancel()


async def test_a_reading_that_was_begun_before_is_not_what_was_asked_for() -> None:
    told: list[Reading] = []
    begun, answers = asyncio.Event(), asyncio.Semaphore(0)

    async def read() -> Pools:
        begun.set()
        await answers.acquire()
        return POOLS

    watch = PoolWatch(read, told.append, period_s=3600.0, min_pause_s=0.0)
    running = asyncio.create_task(watch.run())
    try:
        await begun.wait()
        asked = asyncio.create_task(watch.refresh(60.0))
        await asyncio.sleep(0)
        begun.clear()
        answers.release()
        await begun.wait()
        assert len(told) == 1 and not asked.done()
        answers.release()
        assert await asked
    finally:
        running.cancel()


async def test_who_asks_for_a_reading_does_not_wait_for_a_pool_that_hangs() -> None:
    async def read() -> Pools:
        await asyncio.Event().wait()
        return POOLS

    watch = PoolWatch(read, lambda reading: None)
    running = asyncio.create_task(watch.run())
    try:
        assert not await watch.refresh(0.01)
    finally:
        running.cancel()
