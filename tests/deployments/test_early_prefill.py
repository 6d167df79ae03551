"""A prefill engine begins with a prompt while the decode engine still looks for its blocks, where that must pay."""

import asyncio

import pytest

from deployments.decode import Beginnings
from deployments.errors import RequestTooLargeError
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, PROMPT, Pools, is_decoding, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import random_prompt, reference

OTHER = random_prompt(150, seed=5)
# The occupant's 900 tokens take half a minute: it is there for as long as a test looks, and the lease is longer.
OCCUPANT_STEP_S, LEASE_S = 0.03, 120.0


async def occupy(pools: Pools) -> asyncio.Task[object]:
    """A request has the decode engine's only seat until its task is cancelled."""
    pools.decode.engine.step_s = OCCUPANT_STEP_S
    occupant = asyncio.create_task(pools.collect(greedy("occupant", random_prompt(9, seed=8), 900)))
    await pools.decode.engine.until(is_decoding)
    return occupant


async def vacate(pools: Pools, occupant: asyncio.Task[object]) -> None:
    occupant.cancel()
    pools.decode.engine.step_s = 0.0
    with pytest.raises(asyncio.CancelledError):
        await occupant


async def test_a_prompt_is_computed_while_it_waits_for_its_place(start: StartPools) -> None:
    pools = await start(max_num_seqs=1, lease_s=LEASE_S)
    occupant = await occupy(pools)
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, NUM_TOKENS)))
    await pools.prefill.engine.until(lambda engine: engine.stats().prompt_tokens >= len(PROMPT))
    stats = await pools.decode.engine.stats()
    assert (stats.num_waiting, stats.num_reserved) == (1, 0), "no chunk may be passed on"
    await vacate(pools, occupant)
    assert tokens_of(await reading) == reference("llama", PROMPT, NUM_TOKENS)
    assert pools.decode.front.handoff.num_failures == 0
    await pools.wait_idle()


async def test_of_prompts_that_wait_for_a_place_only_the_first_is_begun(start: StartPools) -> None:
    pools = await start(max_num_seqs=1, lease_s=LEASE_S)
    occupant = await occupy(pools)
    readings = [asyncio.create_task(pools.collect(greedy(f"{seed}", p, 3))) for seed, p in enumerate((PROMPT, OTHER))]
    await pools.decode.engine.until(lambda engine: engine.stats().num_waiting == 2)
    await pools.prefill.engine.until(lambda engine: engine.stats().prompt_tokens >= len(PROMPT))
    stats = await pools.prefill.engine.stats()
    assert (stats.prompt_tokens, stats.num_waiting) == (len(PROMPT), 0)
    await vacate(pools, occupant)
    assert [tokens_of(await reading) for reading in readings] == [reference("llama", p, 3) for p in (PROMPT, OTHER)]
    await pools.wait_idle()


async def test_a_prompt_with_a_known_beginning_is_begun_behind_what_is_cached(start: StartPools) -> None:
    pools = await start(max_num_seqs=1, lease_s=LEASE_S)
    await pools.collect(greedy("earlier", PROMPT[:100], NUM_TOKENS))
    occupant = await occupy(pools)
    computed = (await pools.prefill.engine.stats()).prompt_tokens
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, NUM_TOKENS)))
    await pools.decode.engine.until(lambda engine: engine.stats().num_waiting == 1)
    assert (await pools.prefill.engine.stats()).prompt_tokens == computed
    await vacate(pools, occupant)
    assert tokens_of(await reading) == reference("llama", PROMPT, NUM_TOKENS)
    await pools.wait_idle()


@pytest.mark.parametrize("num_known", [100, len(PROMPT)], ids=["partly cached", "all cached, so not left to prefill"])
async def test_what_was_begun_though_it_is_cached_gives_the_same_tokens(
    start: StartPools, num_known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.decode._MAX_BEGINNINGS", 1)
    pools = await start()
    await pools.collect(greedy("earlier", PROMPT[:num_known], NUM_TOKENS))
    await pools.collect(greedy("another", OTHER, NUM_TOKENS))  # its beginning is remembered instead
    assert tokens_of(await pools.collect(greedy("r", PROMPT, NUM_TOKENS))) == reference("llama", PROMPT, NUM_TOKENS)
    assert pools.decode.front.handoff.num_failures == 0
    await pools.wait_idle()


async def test_a_prompt_that_the_decode_engine_refuses_is_held_nowhere(start: StartPools) -> None:
    pools = await start()
    with pytest.raises(RequestTooLargeError):
        await pools.collect(greedy("r", PROMPT, 100_000))
    await pools.wait_idle()


def test_only_so_many_beginnings_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.decode._MAX_BEGINNINGS", 2)
    beginnings = Beginnings(4)
    a, b, c = (greedy("r", (first, 2, 3, 4, 5), 1) for first in range(3))
    assert [beginnings.note(request) for request in (a, b, a)] == [True, True, False]
    assert [beginnings.note(request) for request in (c, a, b)] == [True, False, True], "b was the oldest"
    assert [beginnings.note(greedy("r", (1, 2, 3, 4), 1)) for _ in range(2)] == [True, True], "nothing of it is cached"
