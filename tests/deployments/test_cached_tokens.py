"""How many prompt tokens a client is told were cached: those that no engine has computed for its request."""

import asyncio

import pytest

from deployments.messages import TokenOutput
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, PROMPT, Pools, tokens_of
from tests.engine.driving import BLOCK_SIZE, greedy
from tests.engine.families import random_prompt, reference
from tests.waiting import until

# All whole blocks but that of the last token, which is always computed.
ALL = (len(PROMPT) - 1) // BLOCK_SIZE * BLOCK_SIZE


async def cached(pools: Pools, name: str, prompt: tuple[int, ...] = PROMPT) -> int:
    """Ask, and add up what is said as the API does."""
    return told(await pools.collect(greedy(name, prompt, NUM_TOKENS)))


def told(outputs: list[TokenOutput]) -> int:
    return min(output.num_cached_tokens for output in outputs)


async def test_what_either_engine_alone_has_cached_counts_as_far_as_nobody_computes_it(start: StartPools) -> None:
    pools = await start(num_decode=2)
    assert await cached(pools, "new") == 0
    assert await cached(pools, "decode engine") == ALL
    pools.decodes.reverse()
    assert await cached(pools, "only the prefill engine") == ALL
    await until(lambda: pools.prefill.front.handoff.num_requests == 2)
    assert await cached(pools, "both, in part", PROMPT[:50] + random_prompt(100, seed=4)) == 48
    await pools.wait_idle()


async def test_a_prefix_that_the_prefill_engine_computes_again_is_not_cached_though_decode_has_it(
    start: StartPools,
) -> None:
    pools = await start(num_prefill=2)
    await cached(pools, "earlier", PROMPT[:50])
    pools.prefills.reverse()
    assert await cached(pools, "later") == 0
    assert (await pools.prefill.engine.stats()).prompt_tokens == len(PROMPT)
    await pools.wait_idle()


async def test_every_output_says_the_same_where_nothing_went_wrong(start: StartPools) -> None:
    pools = await start(num_decode=2)
    await cached(pools, "earlier", PROMPT[:100])
    pools.decodes.reverse()
    outputs = await pools.collect(greedy("later", PROMPT, NUM_TOKENS))
    assert {output.num_cached_tokens for output in outputs} == {96}
    await pools.wait_idle()


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("num_generated", [0, 3])
async def test_what_a_request_computed_before_it_was_resumed_is_not_cached_for_it(
    start: StartPools, is_known: bool, num_generated: int
) -> None:
    pools = await start(num_decode=3)
    if is_known:
        await cached(pools, "earlier")
        pools.decodes.reverse()
    pools.engines[1].holds = pools.engines[3].holds = lambda chunk: num_generated == 0 and chunk.is_last
    victim = pools.engines[3 if is_known else 1]
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, 200)))
    if num_generated == 0:
        await victim.has_held.wait()
    else:
        await victim.until(lambda engine: engine.stats().generated_tokens >= num_generated)
    victim.die()
    victim.lets_go.set()
    outputs = await reading
    assert tokens_of(outputs) == reference("llama", PROMPT, 200)
    assert told(outputs) == (ALL if is_known else 0)
    await pools.wait_idle()


async def test_what_a_lost_decode_replica_had_the_prefill_engine_compute_is_not_cached_for_the_next(
    start: StartPools,
) -> None:
    pools = await start(num_decode=2)
    pools.decode.engine.holds = lambda chunk: True
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, NUM_TOKENS)))
    await pools.prefill.engine.until(lambda engine: engine.stats().prompt_tokens >= 64)
    pools.decode.engine.die()
    pools.decode.engine.lets_go.set()
    assert told(await reading) == 0
    assert (await pools.prefill.engine.stats()).prefix_hit_tokens > 0, "it was found, but its own"
    await pools.wait_idle()


@pytest.mark.parametrize(("num_failures", "num_cached"), [(1, ALL), (100, 0)], ids=["again", "at last by decode"])
async def test_a_broken_hand_off_leaves_cached_what_nobody_then_computes(
    start: StartPools, num_failures: int, num_cached: int
) -> None:
    pools = await start(num_decode=2)
    await cached(pools, "earlier")
    pools.decodes.reverse()
    pools.engines[2].fail_receives = num_failures
    assert await cached(pools, "later") == num_cached
    await pools.wait_idle()
    pools.engines[2].fail_receives = 1
    assert await cached(pools, "new", random_prompt(150, seed=9)) == 0, "found by the second attempt, its own"
    await pools.wait_idle()
