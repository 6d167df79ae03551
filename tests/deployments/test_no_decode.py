"""A decode pool that may have no replica: the ingress holds requests until one is there, and is healthy without."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from deployments.api.failures import failure_of
from deployments.errors import StartingError
from deployments.load.held import HoldBounds
from deployments.load.reading import DECODE
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, Pools, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import random_prompt, reference
from tests.waiting import PATIENCE_S, until

StartAsleep = Callable[..., Awaitable[Pools]]
PATIENT = HoldBounds(max_requests=10, max_s=PATIENCE_S)


@pytest.fixture
def asleep(start: StartPools) -> StartAsleep:
    """Starts pools without a decode replica, of which the ingress knows."""

    async def begin(hold: HoldBounds = PATIENT) -> Pools:
        pools = await start(num_prefill=1, num_decode=0, hold=hold)
        await pools.read()
        return pools

    return begin


@asynccontextmanager
async def watching(pools: Pools) -> AsyncIterator[None]:
    """The ingress reads the pools by itself, and asks whether they can serve."""
    tasks = [asyncio.create_task(pools.backend.watch.run()), asyncio.create_task(pools.backend.pool_health.watch(0.05))]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def num_held(metrics: bytes) -> float:
    (value,) = re.findall(rb'^kvrelay_requests_held{ingress="i0"} (\S+)$', metrics, re.MULTILINE)
    return float(value)


async def test_requests_that_come_while_there_is_no_replica_are_served_by_the_first_one_as_they_should_be(
    asleep: StartAsleep,
) -> None:
    pools = await asleep()
    prompts = [random_prompt(length, seed=length) for length in (5, 40, 150)]
    async with watching(pools):
        answers = [asyncio.create_task(pools.collect(greedy(f"r{len(p)}", p, NUM_TOKENS))) for p in prompts]
        leaver = pools.generate(greedy("leaver", prompts[0], NUM_TOKENS))
        await until(lambda: pools.backend.held.count == 4)
        assert pools.backend.held.tokens == 5 + 40 + 150 + 5
        assert num_held(await pools.backend.metrics()) == 4
        await leaver.aclose()
        await until(lambda: pools.backend.held.count == 3)
        assert pools.tokens.num_streams == 3
        await pools.start_decode("d0")
        for prompt, answer in zip(prompts, answers, strict=True):
            assert tokens_of(await answer) == reference("llama", prompt, NUM_TOKENS)
    await pools.wait_idle()
    assert pools.backend.held.count == 0
    assert (await pools.decode.front.stats()).engine.finished == 3, "of the one that left no engine has heard"


async def test_while_somebody_waits_the_pools_are_read_more_often(asleep: StartAsleep) -> None:
    pools = await asleep()
    async with watching(pools):
        stream = pools.generate(greedy("r", random_prompt(5, seed=1), NUM_TOKENS))
        before = pools.backend.own_stats().num_readings
        async with asyncio.timeout(PATIENCE_S):
            began_s = asyncio.get_running_loop().time()
            await until(lambda: pools.backend.own_stats().num_readings >= before + 5)
            # Once a second without it; ten times as often with it.
            assert asyncio.get_running_loop().time() - began_s < 4.0
        await stream.aclose()


async def test_a_service_without_a_decode_replica_is_healthy_and_tells_its_numbers(asleep: StartAsleep) -> None:
    pools = await asleep()
    assert (await pools.backend.read_pools())[DECODE] == []
    assert num_held(await pools.backend.metrics()) == 0
    async with watching(pools):
        await until(lambda: pools.backend.pool_health.state() == (True, "ok"))
        await pools.start_decode("d0")
        outputs = await pools.collect(greedy("r", random_prompt(40, seed=1), NUM_TOKENS))
        assert tokens_of(outputs) == reference("llama", random_prompt(40, seed=1), NUM_TOKENS)


async def test_a_replica_that_cannot_serve_makes_the_service_unhealthy_as_ever(
    asleep: StartAsleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = await asleep()
    await pools.start_decode("d0")

    async def fail() -> None:
        raise RuntimeError("the engine is broken")

    monkeypatch.setattr(pools.decode.deployment, "ready", fail)
    async with watching(pools):
        await until(lambda: "the engine is broken" in pools.backend.pool_health.state()[1])


async def test_one_that_waits_for_too_long_fails_with_503_and_the_service_says_why_it_cannot_serve(
    asleep: StartAsleep,
) -> None:
    pools = await asleep(HoldBounds(max_requests=10, max_s=0.05))
    async with watching(pools):
        async with aclosing(pools.generate(greedy("r", random_prompt(5, seed=1), NUM_TOKENS))) as outputs:
            with pytest.raises(StartingError) as refused:
                await anext(outputs)
        failure = failure_of(refused.value)
        assert (failure.status, failure.code, failure.kind) == (503, "engine_starting", "server_error")
        assert failure.headers() == {"retry-after": "10"} and "ingress.max_start_s" in failure.message
        await until(lambda: "none has started in time" in pools.backend.pool_health.state()[1])
        await pools.start_decode("d0")
        await until(lambda: pools.backend.pool_health.state() == (True, "ok"))


async def test_one_that_waits_at_serve_since_it_came_as_the_last_replica_went_is_given_up_as_well(
    start: StartPools,
) -> None:
    pools = await start(num_prefill=1, num_decode=1, hold=HoldBounds(max_requests=10, max_s=0.05))
    await pools.read()
    gone = pools.decodes.pop()
    stream = pools.generate(greedy("r", random_prompt(5, seed=1), NUM_TOKENS))
    async with watching(pools), aclosing(stream) as outputs:
        with pytest.raises(StartingError, match=r"ingress\.max_start_s"):
            await anext(outputs)
    assert (await gone.front.stats()).engine.finished == 0
