"""A prefill pool that may have no replica: decode computes prompts, and uses the first one that comes."""

import asyncio

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.load.reading import DECODE, PREFILL
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, Pools, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import random_prompt, reference
from tests.waiting import until


async def serve(pools: Pools, seed: int) -> int:
    """One request, as it should be; how many were handed over so far."""
    prompt = random_prompt(150, seed=seed)
    outputs = await pools.collect(greedy(f"r{seed}", prompt, NUM_TOKENS))
    assert tokens_of(outputs) == reference("llama", prompt, NUM_TOKENS)
    await pools.wait_idle()
    return sum(replica.front.handoff.num_requests for replica in pools.prefills)


async def test_decode_computes_prompts_while_there_is_no_prefill_replica_and_leaves_them_to_one_that_comes(
    start: StartPools,
) -> None:
    pools = await start(num_prefill=0, may_lack_prefill=True)
    assert await serve(pools, 1) == 0, "before anything was read"
    await pools.read()
    assert await serve(pools, 2) == 0
    await pools.start_prefill("p0")
    await pools.read()
    assert await serve(pools, 3) == 1
    gone = pools.prefills.pop()
    await pools.read()
    assert await serve(pools, 4) == 0 and gone.front.handoff.num_requests == 1
    assert sum(replica.front.handoff.num_failures for replica in pools.decodes) == 0


async def test_a_service_without_a_prefill_replica_is_healthy_and_tells_its_numbers(start: StartPools) -> None:
    pools = await start(num_prefill=0, may_lack_prefill=True)
    read = await pools.backend.read_pools()
    assert read[PREFILL] == [] and [replica.replica for replica in read[DECODE]] == ["d0"]
    assert b'pool="decode"' in await pools.backend.metrics()
    watching = asyncio.create_task(pools.backend.pool_health.watch())
    await until(lambda: pools.backend.pool_health.state() == (True, "ok"))
    watching.cancel()


async def test_where_a_replica_has_to_be_there_a_pool_without_one_is_an_error(start: StartPools) -> None:
    pools = await start(num_prefill=0)
    with pytest.raises(DeploymentUnavailableError):
        await pools.backend.read_pools()
