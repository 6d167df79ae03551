"""The plan of a storm: which fault comes when, to which pool. Pure, and the same for the same seed.

A fault that costs a pool a replica, or changes how many it has, comes alone: the next one on that pool is planned no
sooner than `SPACING_S` after it. `faults.py` carries the plan out, and waits longer where a pool is not back by then.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import cycle


class Pool(StrEnum):
    """The deployments, by their names in Ray Serve."""

    PREFILL = "Prefill"
    DECODE = "Decode"
    INGRESS = "Ingress"


class Kind(StrEnum):
    """What is done."""

    ENGINE_KILL = "engine killed"
    REPLICA_KILL = "replica killed"
    ENGINE_HANG = "engine stopped for long"
    SCALE_UP = "scaled up"
    SCALE_DOWN = "scaled down"
    INGRESS_KILL = "ingress killed"
    TRANSFER_DELAY = "engine stopped briefly"
    DISCONNECT = "client left"


ENGINE_POOLS = (Pool.PREFILL, Pool.DECODE)
# After these a pool has to find its number of replicas again.
DISRUPTIVE = (
    Kind.ENGINE_KILL, Kind.REPLICA_KILL, Kind.ENGINE_HANG, Kind.SCALE_UP, Kind.SCALE_DOWN, Kind.INGRESS_KILL,
)  # fmt: skip
# An engine was there again 13 to 29 s after a kill, an ingress after 8 to 20 s (two busy cores, 2026-11-27).
SPACING_S = {Pool.PREFILL: 40.0, Pool.DECODE: 40.0, Pool.INGRESS: 55.0}
_JITTER_S = 5.0
# The first fault finds requests in every state; the last one leaves its pool time to come back under load.
_LEAD_S = 5.0
_TAIL_S = 40.0
# So that disconnects and delays, which cost nobody a replica, have their part in short storms too.
_MAX_DISRUPTIVE_SHARE = 0.6
# Shorter and longer than what a health check forgives.
_HANG_S = (15.0, 40.0)
_DELAY_S = (0.3, 2.0)
# Queued, in prefill, in transfer, decoding: a request of the bench takes 1 to 4 s.
_STAY_S = (0.0, 3.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at_s: when it comes, in seconds since the storm began.
        kind: what is done.
        pool: to whose replica; None: to a client.
        pick: which of the pool's replicas, as a share of them, from 0 to below 1.
        seconds: how long a process stands still, or after how long a client leaves.
    """

    at_s: float
    kind: Kind
    pool: Pool | None
    pick: float
    seconds: float = 0.0

    @property
    def is_disruptive(self) -> bool:
        return self.kind in DISRUPTIVE


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was carried out.

    Attributes:
        fault: as planned.
        at_s: when, by the system's monotonic clock.
        victim: whom it hit.
        recovery_s: until its pool had its number of healthy replicas again; None: it never had fewer, or never again.
        error: why it was not carried out or not recovered from.
    """

    fault: Fault
    at_s: float
    victim: str
    recovery_s: float | None = None
    error: str | None = None

    @property
    def end_s(self) -> float:
        """When its consequences for the pool were over."""
        return self.at_s + (self.recovery_s or self.fault.seconds)


def plan_storm(seed: int, duration_s: float, num_faults: int) -> list[Fault]:
    """Plan exactly `num_faults` faults, in order of time.

    Args:
        seed: of every draw.
        duration_s: of the storm; its last seconds are left to the last recovery.
        num_faults: of all kinds together.

    Raises:
        ValueError: it is too short for a storm.
    """
    if duration_s <= _LEAD_S + _TAIL_S:
        raise ValueError(f"a storm of {duration_s:g} s is too short; it takes more than {_LEAD_S + _TAIL_S:g} s")
    rng = random.Random(seed)
    disruptive = [fault for pool in Pool for fault in _disruptive(rng, pool, duration_s - _TAIL_S)]
    most = round(num_faults * _MAX_DISRUPTIVE_SHARE)
    if len(disruptive) > most:
        disruptive = rng.sample(disruptive, most)
    pools = cycle((None, Pool.PREFILL, None, Pool.DECODE))
    brief = [_brief(rng, next(pools), duration_s) for _ in range(num_faults - len(disruptive))]
    return _alternate(sorted([*disruptive, *brief], key=lambda fault: fault.at_s))


def _disruptive(rng: random.Random, pool: Pool, end_s: float) -> Iterator[Fault]:
    kinds = _endless(rng, pool)
    at_s = _LEAD_S + rng.uniform(0.0, SPACING_S[pool])
    while at_s < end_s:
        kind = next(kinds)
        seconds = rng.uniform(*_HANG_S) if kind is Kind.ENGINE_HANG else 0.0
        yield Fault(at_s, kind, pool, rng.random(), seconds)
        at_s += SPACING_S[pool] + seconds + rng.uniform(0.0, _JITTER_S)


def _endless(rng: random.Random, pool: Pool) -> Iterator[Kind]:
    """Kinds for a pool in random order, each as often as the others; killed engines twice as often."""
    if pool is Pool.INGRESS:
        yield from cycle((Kind.INGRESS_KILL,))
    while True:
        kinds = [Kind.ENGINE_KILL, Kind.ENGINE_KILL, Kind.REPLICA_KILL, Kind.ENGINE_HANG, Kind.SCALE_UP]
        rng.shuffle(kinds)
        yield from kinds


def _brief(rng: random.Random, pool: Pool | None, duration_s: float) -> Fault:
    at_s, pick = rng.uniform(_LEAD_S, duration_s), rng.random()
    if pool is None:
        return Fault(at_s, Kind.DISCONNECT, None, pick, rng.uniform(*_STAY_S))
    return Fault(at_s, Kind.TRANSFER_DELAY, pool, pick, rng.uniform(*_DELAY_S))


def _alternate(faults: list[Fault]) -> list[Fault]:
    """Let every second scaling of a pool be one down, so that it goes up and down again."""
    up: set[Pool | None] = set()
    turned = []
    for fault in faults:
        if fault.kind is Kind.SCALE_UP:
            if fault.pool in up:
                fault = replace(fault, kind=Kind.SCALE_DOWN)
            up ^= {fault.pool}
        turned.append(fault)
    return turned
