"""Whoever asks for the health of the pools is told at once, and what they are told is at most `MAX_AGE_S` old."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.errors import EngineDeadError
from deployments.load.pool_health import MAX_AGE_S, Ask, PoolHealth


class Pool:
    """Answers, fails or says nothing, as it is told."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.asked = asyncio.Event()
        self.failure: Exception | None = None
        self.is_silent = False

    async def ask(self) -> None:
        self.num_asked += 1
        self.asked.set()
        if self.is_silent:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure

    async def until_asked_again(self) -> None:
        for _ in range(2):  # the first one may have begun before
            self.asked.clear()
            await self.asked.wait()
        await asyncio.sleep(0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def watching(clock: Clock, **asks: Ask) -> AsyncIterator[PoolHealth]:
    health = PoolHealth(asks, clock)
    task = asyncio.create_task(health.watch(period_s=0))
    try:
        yield health
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_nothing_is_healthy_before_it_has_answered() -> None:
    assert PoolHealth({"decode": Pool().ask}).state() == (False, "the decode pool did not answer in 5 s")


async def test_the_pools_are_healthy_while_all_of_them_answer() -> None:
    prefill, decode, clock = Pool(), Pool(), Clock()
    async with watching(clock, prefill=prefill.ask, decode=decode.ask) as health:
        for _ in range(3):
            await decode.until_asked_again()
            assert health.state() == (True, "ok")
            clock.now_s += MAX_AGE_S


async def test_being_asked_asks_nobody() -> None:
    pool = Pool()
    async with watching(Clock(), decode=pool.ask) as health:
        await pool.until_asked_again()
        num_asked = pool.num_asked
        for _ in range(100):
            health.state()
        assert pool.num_asked == num_asked


async def test_a_pool_that_stops_to_answer_is_told_of_after_the_bound_and_its_return_at_once() -> None:
    prefill, decode, clock = Pool(), Pool(), Clock()
    async with watching(clock, prefill=prefill.ask, decode=decode.ask) as health:
        await prefill.until_asked_again()
        prefill.is_silent = True
        await prefill.until_asked_again()
        clock.now_s += MAX_AGE_S
        await decode.until_asked_again()
        assert health.state() == (True, "ok")
        clock.now_s += 0.1
        await decode.until_asked_again()
        assert health.state() == (False, "the prefill pool did not answer in 5 s")
        prefill.is_silent = False
        await prefill.until_asked_again()
        assert health.state() == (True, "ok")


async def test_the_reason_of_a_pool_that_fails_is_told() -> None:
    pool, clock = Pool(), Clock()
    pool.failure = EngineDeadError("the engine died")
    async with watching(clock, decode=pool.ask) as health:
        await pool.until_asked_again()
        assert health.state() == (False, "the decode pool cannot serve: EngineDeadError: the engine died")
