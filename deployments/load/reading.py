"""One reading of all pools: the engines' own numbers, and how old they are. `pool_watch.py` takes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.engine.stats import EngineStats
from deployments.replica_stats import ReplicaStats

PREFILL, DECODE = "prefill", "decode"

Pools = Mapping[str, list[ReplicaStats]]


def by_role(pools: Pools) -> dict[str, list[ReplicaStats]]:
    """The same replicas by what they do: those of decode that compute prompts for others are with prefill's."""
    flipped = [replica for replica in pools.get(DECODE, ()) if replica.engine.is_flipped]
    if not flipped:
        return dict(pools)
    decode = [replica for replica in pools[DECODE] if not replica.engine.is_flipped]
    return {**pools, PREFILL: [*pools.get(PREFILL, ()), *flipped], DECODE: decode}


@dataclass(frozen=True, slots=True)
class Reading:
    """The pools as they were.

    Attributes:
        pools: for each pool, by its name, the engines by the names of their replicas.
        as_of_s: what is said was true then or later, in monotonic seconds.
        replicas: all that they said, of which `pools` is a part.
    """

    pools: Mapping[str, Mapping[str, EngineStats]]
    as_of_s: float
    replicas: Pools = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, pools: Pools, taken_s: float) -> "Reading":
        """What replicas said that were asked at `taken_s`; of different ages, so all of it is as old as the oldest."""
        age_s = max((replica.age_s for pool in pools.values() for replica in pool), default=0.0)
        engines = {name: {replica.replica: replica.engine for replica in pool} for name, pool in pools.items()}
        return cls(engines, taken_s - age_s, pools)
