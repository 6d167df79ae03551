"""While a pool, or a replica of one, does not answer, the numbers of all others are seen."""

from typing import Any

import pytest

from deployments.errors import EngineDeadError
from deployments.replica_stats import Positions, ReplicaStats
from tests.deployments.conftest import StartPools
from tests.deployments.pools import Pools, Replica


def lose(replica: Replica) -> None:
    """As if its process were gone, of which Serve has not heard yet."""

    async def stats(read: Positions | None = None) -> ReplicaStats:
        raise EngineDeadError("its process is gone")

    replica.deployment.stats = stats


async def seen(pools: Pools) -> set[str]:
    """The replicas on the live page."""
    document: Any = await pools.backend.live()
    return {replica["name"] for pool in document["pools"].values() for replica in pool["replicas"]}


async def test_a_pool_that_does_not_answer_hides_no_other(start: StartPools) -> None:
    pools = await start()
    lose(pools.decode)
    with pytest.raises(EngineDeadError):  # admission and routing keep what they know
        await pools.read()
    assert await seen(pools) == {"p0"}
    assert b'kvrelay_kv_blocks{pool="prefill",replica="p0"}' in await pools.backend.metrics()


async def test_a_replica_that_does_not_answer_hides_no_other_of_its_pool(start: StartPools) -> None:
    pools = await start(num_decode=2)
    lose(pools.decode)
    await pools.read()
    assert await seen(pools) == {"p0", "d1"}
    text = (await pools.backend.metrics()).decode()
    assert [f'replica="{name}"' in text for name in ("d0", "d1", "p0")] == [False, True, True]
