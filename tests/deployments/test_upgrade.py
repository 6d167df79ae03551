"""While both pools are replaced, replicas of the old model stand beside replicas of the new one."""

from dataclasses import replace

import pytest

from deployments.errors import LayoutMismatchError
from deployments.messages import ANYWHERE
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, PROMPT, Pools, Replica, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import reference


def is_of(replica: Replica, model: str) -> None:
    client = replica.front.engine
    client.info = replace(client.info, kv=model)


async def prompt_tokens(replica: Replica) -> int:
    return await replica.engine.run(lambda engine: engine.stats().prompt_tokens)


async def upgraded(start: StartPools, prefills: list[str]) -> Pools:
    """A decode replica of the old model, beside such prefill replicas."""
    pools = await start(num_prefill=len(prefills))
    is_of(pools.decode, "old")
    for replica, model in zip(pools.prefills, prefills, strict=True):
        is_of(replica, model)
    return pools


@pytest.mark.asyncio
async def test_beside_new_prefill_replicas_alone_an_old_decode_replica_computes_prompts_itself(start):
    pools = await upgraded(start, ["new", "new"])
    answer = await pools.collect(greedy("r", PROMPT, NUM_TOKENS))
    assert tokens_of(answer) == reference("llama", PROMPT, NUM_TOKENS)
    # Not even the first token is of the new model: it computes nothing for the old one.
    assert [await prompt_tokens(replica) for replica in pools.prefills] == [0, 0]
    await pools.wait_idle()


@pytest.mark.asyncio
async def test_a_prefill_replica_of_the_same_model_is_still_used(start):
    pools = await upgraded(start, ["old", "new"])
    answer = await pools.collect(greedy("r", PROMPT, NUM_TOKENS))
    assert tokens_of(answer) == reference("llama", PROMPT, NUM_TOKENS)
    assert [await prompt_tokens(replica) for replica in pools.prefills] == [len(PROMPT), 0]


@pytest.mark.asyncio
async def test_what_is_refused_says_both_models(start):
    pools = await upgraded(start, ["new"])
    request = replace(greedy("r", PROMPT, NUM_TOKENS), route=ANYWHERE)
    with pytest.raises(LayoutMismatchError, match="ours new, theirs old"):
        await pools.prefill.deployment.prefill(request, 0, pools.decode.engine, pools.tokens.address, "old")
