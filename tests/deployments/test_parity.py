"""A decode replica compares tokens before it serves."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

from deployments import parity
from deployments.errors import ParityError
from deployments.parity import check_parity
from tests.deployments.pools import Pools
from tests.waiting import until


@pytest_asyncio.fixture
async def pools() -> AsyncIterator[Pools]:
    pools = await Pools.start()
    yield pools
    await pools.stop()


async def compare(pools: Pools) -> None:
    await check_parity(pools.decode.deployment.generate_by, "127.0.0.1", pools.decode.front.engine.info)


async def test_equal_engines_agree_and_hold_nothing_afterwards(pools: Pools) -> None:
    for _ in range(2):
        await compare(pools)
    await until(lambda: pools.prefill.front.handoff.num_requests == 2)
    await pools.wait_idle()


async def test_kv_that_arrives_broken_refuses_to_start(pools: Pools) -> None:
    noise = torch.Generator().manual_seed(5)  # not any: some may be continued alike
    pools.decode.engine.changes = lambda tensor: torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype)
    with pytest.raises(ParityError, match=r"continued with \[.*\] after a hand-off and with \[.*\] without"):
        await compare(pools)
    await pools.wait_idle()


async def test_a_hand_off_that_does_not_work_does_not_keep_a_replica_from_serving_alone(pools: Pools) -> None:
    pools.decode.engine.fail_receives = 100
    await compare(pools)
    assert pools.decode.front.handoff.num_failures == 3


async def test_a_prefill_pool_that_does_not_answer_is_not_waited_for_for_ever(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "TIMEOUT_S", 0.3)
    pools.prefill.engine.hang()
    await compare(pools)
    pools.prefill.engine.goes_on.set()
    await pools.wait_idle()
