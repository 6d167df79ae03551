"""What the fronts count of requests: where prompts were computed, and what of hand-offs was hidden behind computing."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from deployments.messages import GenerateRequest
from deployments.replica_stats import Positions, ReplicaStats
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, PROMPT, Pools
from tests.engine.driving import BLOCK_SIZE, greedy
from tests.engine.families import random_prompt


async def counted(pools: Pools, name: str, label: str = "") -> dict[str, float]:
    """Values of a metric, summed over replicas, by the value of a label."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families((await pools.backend.metrics()).decode()):
        for sample in family.samples:
            if sample.name == f"kvrelay_{name}":
                kind = sample.labels.get(label, "")
                totals[kind] = totals.get(kind, 0.0) + sample.value
    return totals


async def test_prompts_are_counted_by_where_they_were_computed(start: StartPools) -> None:
    pools = await start(min_tokens=100)
    assert await counted(pools, "prompts_total", "where") == {"cached": 0, "decode": 0, "prefill": 0}
    for name, prompt in (
        ("remote", PROMPT),
        ("again", PROMPT),
        ("short", random_prompt(40, seed=5)),
        ("other", random_prompt(40, seed=6)),
        ("third", random_prompt(40, seed=7)),
        ("within a block", random_prompt(BLOCK_SIZE - 1, seed=8)),
    ):
        await pools.collect(greedy(name, prompt, NUM_TOKENS))
    await pools.wait_idle()
    assert await counted(pools, "prompts_total", "where") == {"cached": 1, "decode": 4, "prefill": 1}


async def test_prompt_tokens_are_counted_by_where_their_kv_came_from(start: StartPools) -> None:
    pools = await start(num_decode=2)
    cached = (len(PROMPT) - 1) // BLOCK_SIZE * BLOCK_SIZE

    async def ask(name: str) -> dict[str, float]:
        before = await counted(pools, "prompt_tokens_by_origin_total", "origin")
        await pools.collect(greedy(name, PROMPT, NUM_TOKENS))
        await pools.wait_idle()
        after = await counted(pools, "prompt_tokens_by_origin_total", "origin")
        return {origin: count - before.get(origin, 0) for origin, count in after.items() if count != before.get(origin)}

    assert await ask("new") == {"miss": len(PROMPT)}
    assert await ask("this engine has it") == {"engine": cached, "miss": len(PROMPT) - cached}
    pools.decodes.reverse()
    found = await ask("only the prefill engine has it")
    assert found == {"engine": cached, "delta": cached, "miss": len(PROMPT) - cached}, "found by one, sent to the other"


async def test_a_prompt_of_one_token_that_ends_in_the_prefill_pool_counts_there(start: StartPools) -> None:
    pools = await start(min_tokens=16)
    await pools.collect(greedy("r1", PROMPT, 1))
    await pools.wait_idle()
    assert (await counted(pools, "prompts_total", "where"))["prefill"] == 1


async def test_hand_offs_are_timed_though_nobody_wants_a_receipt(start: StartPools) -> None:
    pools = await start(min_tokens=16)
    request: GenerateRequest = greedy("r1", PROMPT, NUM_TOKENS)
    assert not request.wants_receipt
    await pools.collect(request)
    await pools.wait_idle()
    hidden, exposed = [
        sum((await counted(pools, f"handoff_{part}_seconds_total")).values()) for part in ("hidden", "exposed")
    ]
    assert min(hidden, exposed) >= 0 and hidden + exposed > 0
    whole = sum((await counted(pools, "handoff_seconds_sum")).values())
    assert hidden <= whole + 1e-6, "chunks that are on their way at once count once"


async def test_who_read_the_metrics_at_once_have_the_replicas_asked_once(start: StartPools) -> None:
    pools = await start(min_tokens=16)
    asked, stats = [], pools.decode.deployment.stats

    async def counting(read: Positions | None = None) -> ReplicaStats:
        asked.append(read)
        told: ReplicaStats = await stats(read)
        return told

    pools.decode.deployment.stats = counting
    first, second = await asyncio.gather(pools.backend.metrics(), pools.backend.metrics())
    assert first is second and len(asked) == 1
    assert await pools.backend.metrics() is not first and len(asked) == 2
