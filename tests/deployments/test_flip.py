"""A decode replica computes prompts for others for a while: it is one by what it says, and no request notices."""

import asyncio
from dataclasses import replace

import pytest

from deployments.errors import TransferError
from deployments.load.reading import DECODE, PREFILL
from deployments.messages import Route
from tests.deployments.conftest import StartPools
from tests.deployments.pools import MANY_TOKENS, NUM_TOKENS, PROMPT, Pools, is_decoding, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import random_prompt, reference

PROMPTS = [random_prompt(150, seed=seed) for seed in range(10, 18)]
EXPECTED = [reference("llama", prompt, NUM_TOKENS) for prompt in PROMPTS]


async def started(start: StartPools) -> Pools:
    """One prefill replica and three of decode, of which all have been heard."""
    pools = await start(num_decode=3)
    await pools.read()
    return pools


async def flip(pools: Pools, name: str, is_flipped: bool = True) -> None:
    """Tell a decode replica its role; the ingress reads it as it reads all else."""
    (replica,) = [replica for replica in pools.decodes if replica.name == name]
    replica.engine.take_role(is_flipped)
    await pools.read()
    await pools.read()


async def numbers(pools: Pools, name: str) -> tuple[int, int]:
    """Prompt tokens that a decode replica has computed, and tokens that it has drawn."""
    (replica,) = [replica for replica in pools.decodes if replica.name == name]
    stats = await replica.engine.stats()
    return stats.prompt_tokens, stats.generated_tokens


async def serve(pools: Pools, suffix: str = "") -> None:
    """All prompts at once, each with the tokens that it has without any hand-off."""
    requests = [greedy(f"r{i}{suffix}", prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]
    answers = await asyncio.gather(*(pools.collect(request) for request in requests))
    assert [tokens_of(answer) for answer in answers] == EXPECTED
    await pools.wait_idle()


async def test_a_flipped_replica_counts_as_one_of_prefill_wherever_it_is_looked_at(start: StartPools) -> None:
    pools = await started(start)
    await flip(pools, "d1")
    read = await pools.backend.read_pools()
    assert {pool: [replica.replica for replica in of] for pool, of in read.items()} == {
        PREFILL: ["p0", "d1"],
        DECODE: ["d0", "d2"],
    }
    text = (await pools.backend.metrics()).decode()
    assert 'kvrelay_flipped{pool="prefill",replica="d1"} 1.0' in text
    assert 'kvrelay_flipped{pool="decode",replica="d0"} 0.0' in text


async def test_a_flipped_replica_computes_prompts_for_the_others_and_decodes_none(start: StartPools) -> None:
    pools = await started(start)
    await flip(pools, "d1")
    await serve(pools)
    computed, drawn = await numbers(pools, "d1")
    assert computed > 0 and computed % len(PROMPT) == 0
    assert drawn == computed // len(PROMPT), "one token of each prompt that it has computed"
    handed_over = [replica.front.handoff.num_requests for replica in [*pools.prefills, *pools.decodes]]
    assert sum(handed_over) == len(PROMPTS) and min(handed_over[0], handed_over[2]) > 0


async def test_a_replica_that_flips_back_decodes_again_without_having_lost_anything(start: StartPools) -> None:
    pools = await started(start)
    await flip(pools, "d1")
    await serve(pools, "-flipped")
    before = await numbers(pools, "d1")
    await flip(pools, "d1", is_flipped=False)
    await serve(pools, "-back")
    computed, drawn = await numbers(pools, "d1")
    assert computed - before[0] < len(PROMPT), "of its own prompts no more than what no whole block holds"
    assert drawn > before[1]


async def test_what_runs_where_a_replica_flips_ends_there(start: StartPools) -> None:
    pools = await start(num_decode=1)
    await pools.read()
    running = asyncio.create_task(pools.collect(greedy("long", PROMPT, MANY_TOKENS)))
    await pools.decode.engine.until(is_decoding)
    await flip(pools, "d0")
    assert tokens_of(await running) == reference("llama", PROMPT, MANY_TOKENS)


async def test_roles_that_change_under_load_lose_no_request_and_change_no_token(start: StartPools) -> None:
    pools = await started(start)

    async def change() -> None:
        for name, is_flipped in [("d0", True), ("d1", True), ("d0", False), ("d2", True), ("d1", False)]:
            await flip(pools, name, is_flipped)

    for round_ in range(3):
        await asyncio.gather(change(), serve(pools, f"-{round_}"))
    assert await pools.backend.health() is not None
    assert sum(replica.front.handoff.num_failures for replica in pools.decodes) == 0


async def test_roles_of_which_the_ingress_has_not_heard_cost_no_request(start: StartPools) -> None:
    pools = await started(start)
    for replica in pools.decodes:
        replica.engine.take_role(True)  # it still sends requests there
    await serve(pools, "-unread")
    for replica in pools.decodes:
        replica.engine.take_role(False)
    await serve(pools, "-back")


async def test_where_all_that_decode_is_left_with_dies_a_flipped_replica_decodes(start: StartPools) -> None:
    pools = await start(num_decode=2)
    await pools.read()
    await flip(pools, "d1")
    pools.decode.engine.die()
    await serve(pools)


async def test_a_flipped_replica_that_dies_costs_no_request(start: StartPools) -> None:
    pools = await started(start)
    await flip(pools, "d1")
    serving = asyncio.create_task(serve(pools))
    await pools.decodes[1].engine.until(lambda engine: engine.stats().steps > 0)
    pools.decodes[1].engine.die()
    await serving


async def test_a_replica_does_not_hand_over_to_itself(start: StartPools) -> None:
    pools = await start(num_decode=1)
    asked = replace(greedy("r", PROMPT, MANY_TOKENS), route=Route("d0", "d0", 0, by_peer=True))
    outputs = await pools.collect(asked)
    assert tokens_of(outputs) == reference("llama", PROMPT, MANY_TOKENS)
    (front,) = [replica.front for replica in pools.decodes]
    assert front.handoff.num_requests == 0


async def test_who_asks_the_replica_that_serves_a_request_is_told_so(start: StartPools) -> None:
    pools = await start(num_decode=1)
    running = asyncio.create_task(pools.collect(greedy("long", PROMPT, MANY_TOKENS)))
    await pools.decode.engine.until(is_decoding)
    with pytest.raises(TransferError, match="serves it already"):
        await pools.decode.deployment.prefill(
            greedy("long", PROMPT, MANY_TOKENS), 0, pools.decode.engine, pools.tokens.address
        )
    assert tokens_of(await running) == reference("llama", PROMPT, MANY_TOKENS)
