"""Requests go to the replicas that have their KV, in pools of real engines; what is out of date costs no answer."""

import asyncio

import pytest

from deployments.engine.engine import Engine
from deployments.load.reading import DECODE
from deployments.messages import ANYWHERE
from deployments.routing.scoring import Reason
from deployments.routing.settings import RoutingSettings
from tests.deployments.conftest import StartPools
from tests.deployments.pools import MANY_TOKENS, NUM_TOKENS, PROMPT, Pools, tokens_of
from tests.engine.driving import BLOCK_SIZE, greedy
from tests.engine.families import random_prompt, reference
from tests.waiting import until

WHOLE_BLOCKS = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
NEXT_TURN = PROMPT + random_prompt(8, seed=4)  # fewer than are handed over


KNOWS_WHAT_IT_IS_TOLD = RoutingSettings(expected_for_s=1e-6)


async def two_each(start: StartPools, **options: object) -> Pools:
    pools = await start(num_prefill=2, num_decode=2, **options)
    await pools.read()
    return pools


async def serve(pools: Pools, name: str, prompt: tuple[int, ...] = PROMPT) -> int:
    """Have a request served as it should be; how many of its tokens nobody computed."""
    outputs = await pools.collect(greedy(name, prompt, NUM_TOKENS))
    assert tokens_of(outputs) == reference("llama", prompt, NUM_TOKENS)
    await pools.wait_idle()
    return min(output.num_cached_tokens for output in outputs)


async def decoded_by(pools: Pools) -> list[int]:
    """Tokens that each decode engine has drawn; the first ones of prompts from elsewhere are not its own."""
    return [(await replica.engine.stats()).generated_tokens for replica in pools.decodes]


def has_begun(engine: Engine) -> bool:
    return engine.stats().generated_tokens >= 1


def num_handed_over(pools: Pools) -> int:
    return sum(replica.front.handoff.num_requests for replica in pools.prefills)


@pytest.mark.parametrize("swap", [False, True])
async def test_the_next_turn_goes_to_the_decode_replica_that_has_the_kv(start: StartPools, swap: bool) -> None:
    pools = await two_each(start, routing=KNOWS_WHAT_IT_IS_TOLD)
    assert await serve(pools, "first") == 0
    if swap:  # whoever asks for any replica is given another one now
        pools.decodes.reverse()
        pools.prefills.reverse()
    await pools.read()
    await pools.read()
    assert await serve(pools, "next", NEXT_TURN) == WHOLE_BLOCKS
    assert num_handed_over(pools) == 1, "the few new tokens were computed there"
    assert sorted(await decoded_by(pools)) == [0, 2 * NUM_TOKENS - 1]
    assert pools.routers.choices[DECODE, Reason.CACHE] == 1
    (holder,) = [r for r in pools.decodes if (await r.engine.stats()).generated_tokens]
    text = (await pools.backend.metrics()).decode()
    assert 'kvrelay_routing_choices_total{ingress="i0",pool="decode",reason="cache"} 1.0' in text
    assert f'kvrelay_routing_promised_tokens_total{{ingress="i0",pool="decode"}} {WHOLE_BLOCKS}.0' in text
    assert f'kvrelay_prefix_hit_tokens_total{{pool="decode",replica="{holder.name}"}} {WHOLE_BLOCKS}.0' in text


async def test_what_was_just_sent_counts_before_any_replica_has_told_of_it(start: StartPools) -> None:
    pools = await two_each(start)
    assert await serve(pools, "first") == 0
    assert await serve(pools, "next", NEXT_TURN) == WHOLE_BLOCKS
    assert pools.routers.promised_tokens[DECODE] == WHOLE_BLOCKS
    assert pools.routers.num_open == 0, "what has ended does not count"


async def test_an_ingress_that_starts_late_sends_the_next_turn_where_the_kv_is(start: StartPools) -> None:
    pools = await two_each(start)
    await serve(pools, "first")
    (holder,) = [replica for replica in pools.decodes if (await replica.engine.stats()).generated_tokens]
    pools.start_ingress()
    pools.decodes.sort(key=lambda replica: replica is holder)  # whoever asks for any replica is given the other one
    await pools.read()  # who is there comes first, then what they have
    await pools.read()
    assert await serve(pools, "next", NEXT_TURN) == WHOLE_BLOCKS
    assert pools.routers.choices == {(DECODE, Reason.CACHE): 1}


async def test_a_prompt_is_computed_by_the_prefill_replica_that_has_most_of_it(start: StartPools) -> None:
    pools = await two_each(start, routing=KNOWS_WHAT_IT_IS_TOLD)
    other_end = PROMPT[:120] + random_prompt(60, seed=5)
    await serve(pools, "first")
    await pools.read()
    await pools.read()
    assert await serve(pools, "other end", other_end) == 120
    assert num_handed_over(pools) == 2
    computed = [(await replica.engine.stats()).prompt_tokens for replica in pools.prefills]
    assert sorted(computed) == [0, len(PROMPT) + 60]


async def test_a_replica_that_dies_costs_a_retry_and_is_asked_no_more(start: StartPools) -> None:
    pools = await two_each(start)
    for replica in pools.decodes:
        replica.engine.stop_at(has_begun)
    reading = asyncio.create_task(pools.collect(greedy("first", PROMPT, MANY_TOKENS)))
    while not any(counts := await decoded_by(pools)):  # noqa: ASYNC110  an engine tells nobody how far it is
        await asyncio.sleep(0.001)
    victim = pools.decodes[counts.index(max(counts))]
    victim.engine.die()
    for replica in pools.decodes:
        replica.engine.stop_at(None)
    assert tokens_of(await reading) == reference("llama", PROMPT, MANY_TOKENS)
    others = [pools.routers.route(greedy(f"r{i}", random_prompt(50, seed=i), 4)) for i in range(8)]
    assert victim.name not in {routed.route.decode for routed in others}, "before the next reading"
    for routed in others:
        routed.ended()
    await pools.read()
    assert await serve(pools, "next", NEXT_TURN) == WHOLE_BLOCKS, "the one that went on with it has all of it"


async def test_a_hand_off_that_failed_is_tried_with_another_prefill_replica(start: StartPools) -> None:
    pools = await two_each(start)
    named = pools.routers.route(greedy("asked before", PROMPT, 4)).route.prefill
    pools.prefills.sort(key=lambda replica: replica.name == named)
    for replica in pools.decodes:
        replica.engine.fail_receives = 1
    assert await serve(pools, "first") == 0
    # Decode may have answered before prefill's front has heard that the last chunk is there.
    await until(lambda: any(replica.front.handoff.num_requests for replica in pools.prefills))
    assert [replica.front.handoff.num_requests for replica in pools.prefills] == [1, 0]


async def test_a_replica_that_forgot_its_cache_is_still_right(start: StartPools) -> None:
    pools = await two_each(start, num_blocks=64)
    await serve(pools, "first")
    await pools.read()
    await pools.read()
    (holder,) = [replica for replica in pools.decodes if (await replica.engine.stats()).generated_tokens]
    for number in range(4):  # fill its pool behind the router's back
        request = greedy(f"direct {number}", random_prompt(250, seed=20 + number), 1)
        pools.tokens.open(request.request_id, lambda: None, lambda _: None)
        await holder.deployment.generate_by(request, pools.tokens.address, None)
    await serve(pools, "next", NEXT_TURN)


@pytest.mark.parametrize(
    "options", [{}, {"num_prefill": 2, "num_decode": 2, "routing": RoutingSettings(by_prefix=False)}]
)
async def test_without_a_choice_or_if_told_so_serve_chooses(start: StartPools, options: dict[str, object]) -> None:
    pools = await start(**options)
    for _ in range(2):
        await pools.read()
    assert pools.routers.positions(DECODE) is None, "nobody asks what is cached"
    assert pools.routers.route(greedy("r", PROMPT, 4)).route == ANYWHERE
    assert await serve(pools, "first") == 0
    assert pools.routers.choices == {}
