"""While both pools are replaced, replicas of the old model stand beside replicas of the new one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from deployments import ingress
from deployments.engine_info import EngineInfo
from deployments.errors import LayoutMismatchError
from deployments.ingress import find_engine
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


@dataclass
class DecodeHandle:
    """Of a pool whose replicas are asked one after the other; `models` are theirs."""

    models: Iterator[str]

    @property
    def engine_info(self) -> "DecodeHandle":
        return self

    async def remote(self) -> EngineInfo:
        limits = EngineInfo("folder", 100, 512, (), block_size=16, bytes_per_block=1, lease_s=1.0, pid=1, num_blocks=8)
        return replace(limits, model=next(self.models))


@pytest.mark.asyncio
async def test_an_ingress_of_the_new_model_waits_for_an_engine_of_it(monkeypatch):
    monkeypatch.setattr(ingress, "_UPGRADE_POLL_S", 0.0)
    handle: Any = DecodeHandle(iter(["old", "old", "new", "old"]))
    assert (await find_engine(handle, "new")).model == "new"
