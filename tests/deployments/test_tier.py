"""Pools that share a tier: a request that waits for KV of it goes on as without, whatever fails meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from deployments.engine.engine import Engine
from deployments.load.reading import DECODE, PREFILL
from deployments.messages import TokenOutput
from deployments.routing.scoring import Reason
from tests.deployments.conftest import StartPools
from tests.deployments.faulty_engine import OBJECT_BLOCKS
from tests.deployments.pools import NUM_TOKENS, PROMPT, Pools, tokens_of
from tests.engine.driving import BLOCK_SIZE, greedy
from tests.engine.families import random_prompt, reference
from tests.kv_tier.local_tier import LocalTier
from tests.waiting import PATIENCE_S

OBJECT_TOKENS = OBJECT_BLOCKS * BLOCK_SIZE
NUM_OBJECTS = (len(PROMPT) - 1) // OBJECT_TOKENS
ALL = NUM_OBJECTS * OBJECT_TOKENS
SHORT = random_prompt(20, seed=8)  # too short for the tier


@pytest_asyncio.fixture
async def tier(start: StartPools) -> AsyncIterator[LocalTier]:
    """It is stopped before the pools, of which it asks what it has accepted."""
    tier = LocalTier()
    yield tier
    await asyncio.to_thread(tier.stop)


async def ask(pools: Pools, name: str, num_tokens: int = NUM_TOKENS) -> list[TokenOutput]:
    outputs = await pools.collect(greedy(name, PROMPT, num_tokens))
    assert tokens_of(outputs) == reference("llama", PROMPT, num_tokens)
    return outputs


async def with_kv_in_the_tier(start: StartPools, tier: LocalTier, pools_with_it: tuple[str, ...]) -> Pools:
    """Two replicas each; the first ones have computed the prompt, and the others are asked first from now on."""
    pools = await start(num_prefill=2, num_decode=2, tiers=dict.fromkeys(pools_with_it, tier), max_silence_s=0.4)
    await ask(pools, "earlier")
    await asyncio.to_thread(tier.wait_for, NUM_OBJECTS)
    pools.prefills.reverse()
    pools.decodes.reverse()
    await pools.collect(greedy("short", SHORT, 2))  # from now on these engines know the ingress
    return pools


def has_a_seat_taken(engine: Engine) -> bool:
    return engine.stats().num_running == 1


def has_begun(engine: Engine) -> bool:
    return engine.stats().generated_tokens >= 3


@pytest.mark.parametrize("waits", [DECODE, PREFILL])
async def test_a_replica_that_never_had_the_prompt_computes_only_what_the_tier_has_not(
    start: StartPools, tier: LocalTier, waits: str
) -> None:
    pools = await with_kv_in_the_tier(start, tier, (waits,))
    outputs = await ask(pools, "later")
    assert {output.num_cached_tokens for output in outputs} == {ALL}
    stats = [await replica.engine.stats() for replica in (pools.prefill, pools.decode)]
    assert sum(one.prompt_tokens for one in stats) == len(SHORT) + len(PROMPT) - ALL
    assert sum(one.tier_hit_tokens for one in stats) == ALL
    text = (await pools.backend.metrics()).decode()
    replica = pools.decode if waits == DECODE else pools.prefill
    labels = f'origin="tier",pool="{waits}",replica="{replica.name}"'
    assert f"kvrelay_prompt_tokens_by_origin_total{{{labels}}} {ALL}.0" in text
    assert f'kvrelay_tier_failures_total{{pool="{waits}",replica="{replica.name}"}} 0.0' in text
    await pools.wait_idle()


async def test_a_session_whose_replica_has_no_seat_goes_on_elsewhere_and_its_kv_comes_along(
    start: StartPools, tier: LocalTier
) -> None:
    pools = await start(num_prefill=2, num_decode=2, tiers={DECODE: tier}, max_num_seqs=1)
    await pools.read()
    await ask(pools, "first turn")
    await asyncio.to_thread(tier.wait_for, NUM_OBJECTS)
    (holder,) = [replica for replica in pools.decodes if (await replica.engine.stats()).generated_tokens]
    (other,) = [replica for replica in pools.decodes if replica is not holder]
    pools.tokens.open("takes the seat", lambda: None, lambda _: None)
    holder.engine.stop_at(has_a_seat_taken)  # for as long as the next turn looks for one
    seated = asyncio.create_task(
        holder.deployment.generate_by(greedy("takes the seat", SHORT, 400), pools.tokens.address, None)
    )
    await holder.engine.until(has_a_seat_taken)
    computed = [(await replica.engine.stats()).prompt_tokens for replica in pools.prefills]
    await pools.read()
    await pools.read()
    outputs = await ask(pools, "next turn")
    assert min(output.num_cached_tokens for output in outputs) == ALL
    assert pools.routers.choices[DECODE, Reason.SPREAD] == 1
    stats = await other.engine.stats()
    assert (stats.tier_hit_tokens, stats.prompt_tokens) == (ALL, len(PROMPT) - ALL)
    assert [(await replica.engine.stats()).prompt_tokens for replica in pools.prefills] == computed
    holder.engine.stop_at(None)
    await seated
    await pools.wait_idle()


async def test_a_request_whose_decode_replica_dies_is_resumed_with_kv_of_the_tier(
    start: StartPools, tier: LocalTier
) -> None:
    pools = await start(num_decode=2, tiers={DECODE: tier})
    pools.decode.engine.stop_at(has_begun)  # while the tier takes what it has
    reading = asyncio.create_task(ask(pools, "r", 200))
    await pools.decode.engine.until(has_begun)
    await asyncio.to_thread(tier.wait_for, NUM_OBJECTS)
    pools.decode.engine.die()
    outputs = await reading
    assert min(output.num_cached_tokens for output in outputs) == 0, "it was computed for this very request"
    assert (await pools.engines[2].stats()).tier_hit_tokens >= ALL
    await pools.wait_idle()


class Case:
    """A request that waits in an engine for KV of the tier."""

    def __init__(self, pools: Pools, tier: LocalTier, waits: str) -> None:
        self.pools = pools
        self.tier = tier
        self.holder = pools.decode if waits == DECODE else pools.prefill
        self.reading = asyncio.create_task(ask(pools, "r"))


async def nothing(case: Case) -> None:
    pass


async def client_leaves(case: Case) -> None:
    case.reading.cancel()


async def ingress_dies(case: Case) -> None:
    await case.pools.tokens.stop()
    case.reading.cancel()


async def objects_are_lost(case: Case) -> None:
    case.tier.num_readable = 2


async def index_dies(case: Case) -> None:
    case.tier.is_away = True
    case.tier.num_readable = 0


async def objects_are_evicted(case: Case) -> None:
    case.tier.restart()


async def its_engine_dies(case: Case) -> None:
    case.holder.engine.die()


async def its_engine_hangs(case: Case) -> None:
    case.holder.engine.hang()
    with pytest.raises(Exception, match="has not answered"):
        await case.holder.deployment.check_health()


FAULTS = [
    nothing,
    client_leaves,
    ingress_dies,
    objects_are_lost,
    index_dies,
    objects_are_evicted,
    its_engine_dies,
    its_engine_hangs,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("waits", [DECODE, PREFILL])
async def test_every_fault_while_a_request_waits_for_the_tier(
    start: StartPools, tier: LocalTier, waits: str, fault: Callable[[Case], Awaitable[None]]
) -> None:
    pools = await with_kv_in_the_tier(start, tier, (waits,))
    tier.is_patient = True
    tier.goes_on.clear()
    case = Case(pools, tier, waits)
    await asyncio.to_thread(tier.is_read.wait)
    await fault(case)
    tier.goes_on.set()
    if case.reading.cancelling():
        with pytest.raises(asyncio.CancelledError):
            await case.reading
    else:
        await case.reading
    for engine in pools.engines:
        engine.goes_on.set()
    async with asyncio.timeout(PATIENCE_S):
        await pools.wait_idle()
