"""The last minutes of the service in slots of a few seconds, of what the ingress reads of the pools anyway.

Adds up; what it means `live.py` says. One `History` lives in each ingress replica: what the pools did it knows as every
other does, what clients saw it knows of its own calls alone.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.engine.stats import LATENCY_BUCKETS_S
from deployments.load.reading import Reading
from deployments.replica_stats import ReplicaStats
from deployments.telemetry.ingress_stats import IngressStats

SLOT_S = 5.0
NUM_SLOTS = 120
MAX_EVENTS = 30
# A replica that has gone is told of for so long.
GONE_S = 60.0
# One that was not heard for longer than what Serve said may be old is gone, where Serve has none that may answer.
LOST_S = 8.0
# Serve's words for replicas that answer nobody.
_TO_COME = {"STARTING", "STOPPED"}
_NUM_BUCKETS = len(LATENCY_BUCKETS_S) + 1

# What is counted of a replica since it started.
ENGINE_COUNTS = (
    "prompt_tokens",
    "prefix_hit_tokens",
    "delta_hit_tokens",
    "tier_hit_tokens",
    "generated_tokens",
    "preemptions",
)
HANDOFF_COUNTS = ("num_requests", "num_failures", "num_bytes", "hidden_s", "exposed_s")
# Before the name of where a prompt was computed (`replica_stats.Computed`).
PROMPTS = "prompts."


@dataclass(frozen=True, slots=True)
class PoolSlot:
    """One pool: what it did in the slot, and how it was at its end.

    Attributes:
        counts: by the names above.
        num_replicas: that answered.
        num_queued_tokens: prompt tokens that waited.
        num_waiting: sequences without blocks.
        num_running: in the batches.
        num_blocks: of all KV pools.
        num_used_blocks: of these.
    """

    counts: Counter[str]
    num_replicas: int
    num_queued_tokens: int
    num_waiting: int
    num_running: int
    num_blocks: int
    num_used_blocks: int


@dataclass(frozen=True, slots=True)
class ClientSlot:
    """What the clients of one ingress replica saw in a slot.

    Attributes:
        ttft: calls by their TTFT, in the buckets of `LATENCY_BUCKETS_S`.
        itl: tokens by the gap before them, likewise.
        refusals: calls that admission refused, by reason and priority.
    """

    ttft: tuple[int, ...] = (0,) * _NUM_BUCKETS
    itl: tuple[int, ...] = (0,) * _NUM_BUCKETS
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)

    def plus(self, other: "ClientSlot") -> "ClientSlot":
        """Of both."""
        return ClientSlot(_sum(self.ttft, other.ttft), _sum(self.itl, other.itl), self.refusals + other.refusals)


@dataclass(frozen=True, slots=True)
class ClientHistory:
    """What the clients of one ingress replica saw lately, by number of the slot."""

    replica: str
    slots: Mapping[int, ClientSlot]


@dataclass(frozen=True, slots=True)
class Slot:
    """Everything of a slot; `number` times `SLOT_S` is the Unix time at which it began."""

    number: int
    seconds: float
    pools: Mapping[str, PoolSlot]
    clients: ClientSlot


@dataclass(frozen=True, slots=True)
class ReplicaEvent:
    """A replica came, is gone, or flipped to this pool; `at_s` in Unix time."""

    at_s: float
    pool: str
    replica: str
    kind: str


@dataclass(frozen=True, slots=True)
class KnownReplica:
    """What a replica said last, and when, in Unix time; and what it did in the slot before."""

    stats: ReplicaStats
    heard_s: float
    recent: Counter[str] = field(default_factory=Counter)


class History:
    """See the module.

    Args:
        count: what this ingress replica has counted up to now; a snapshot.
        clock: Unix time; slots of several ingress replicas are the same by it.
    """

    def __init__(self, count: Callable[[], IngressStats], clock: Callable[[], float] = time.time) -> None:
        self._count = count
        self._clock = clock
        self.slots: deque[Slot] = deque(maxlen=NUM_SLOTS)
        self.events: deque[ReplicaEvent] = deque(maxlen=MAX_EVENTS)
        self.replicas: dict[str, dict[str, KnownReplica]] = {}
        self.gone: dict[tuple[str, str], float] = {}
        self._counted: dict[str, Counter[str]] = {}
        # In this slot, by replicas that have left their pool since.
        self._left: dict[str, Counter[str]] = {}
        self._own = count()
        self._slot_began_s = clock()

    def take(self, reading: Reading) -> None:
        """Note a reading, which has just come; of a pool that is not in it nothing new is known."""
        now_s = self._clock()
        flipped = self._flipped(reading.replicas)
        for pool, replicas in reading.replicas.items():
            self._note_replicas(pool, replicas, now_s, flipped)
        self._forget(now_s)
        if int(now_s // SLOT_S) != int(self._slot_began_s // SLOT_S):
            self._end_slot(reading.replicas, now_s)

    def clients(self) -> ClientHistory:
        """The part of it that others do not know."""
        return ClientHistory(self._own.replica, {slot.number: slot.clients for slot in self.slots})

    def _flipped(self, pools: Mapping[str, Sequence[ReplicaStats]]) -> dict[str, KnownReplica]:
        """Replicas that now do another pool's work: they were not lost, and what they did was counted."""
        now = {stats.replica: pool for pool, replicas in pools.items() for stats in replicas}
        return {
            name: known
            for pool, replicas in self.replicas.items()
            for name, known in replicas.items()
            if now.get(name, pool) != pool
        }

    def _note_replicas(
        self, pool: str, replicas: Sequence[ReplicaStats], now_s: float, flipped: Mapping[str, KnownReplica]
    ) -> None:
        is_first = pool not in self.replicas
        known = self.replicas.setdefault(pool, {})
        names = {stats.replica for stats in replicas}
        for name in known.keys() - names:
            self._part_with(pool, name, now_s, is_gone=name not in flipped)
        for stats in replicas:
            before = known.get(stats.replica)
            if before is None and (before := flipped.get(stats.replica)) is not None:
                self.events.append(ReplicaEvent(now_s, pool, stats.replica, "flipped"))
            elif before is None:
                self._greet(pool, stats, now_s, is_first=is_first)
            recent = Counter[str]() if before is None else before.recent
            known[stats.replica] = KnownReplica(stats, now_s - stats.age_s, recent)

    def note_states(self, states: Mapping[str, Mapping[str, int]]) -> None:
        """What Serve says of the pools: one that has lost all its replicas cannot be read, and tells nothing itself.

        Args:
            states: by pool, how many replicas are in which state, in Serve's words.
        """
        now_s = self._clock()
        for pool in [pool for pool, of in states.items() if of.keys() <= _TO_COME]:
            silent = [name for name, known in self.replicas.get(pool, {}).items() if now_s - known.heard_s > LOST_S]
            for name in silent:
                self._part_with(pool, name, now_s, is_gone=True)

    def _part_with(self, pool: str, name: str, now_s: float, *, is_gone: bool) -> None:
        """What it did until it was last heard it did for this pool."""
        self._left.setdefault(pool, Counter()).update(self._count_anew(self.replicas[pool].pop(name).stats))
        if is_gone:
            self.gone[pool, name] = now_s
            self.events.append(ReplicaEvent(now_s, pool, name, "gone"))

    def _greet(self, pool: str, stats: ReplicaStats, now_s: float, *, is_first: bool) -> None:
        """What those had done that the first reading of a pool finds is past; what comes later begins with nothing.

        Or goes on: one that did not answer for a while has its counts still.
        """
        self.gone.pop((pool, stats.replica), None)
        if is_first:
            self._count_anew(stats)
        else:
            self.events.append(ReplicaEvent(now_s, pool, stats.replica, "came"))

    def _forget(self, now_s: float) -> None:
        """Those that have been gone for long."""
        for key in [key for key, gone_s in self.gone.items() if now_s - gone_s > GONE_S]:
            del self.gone[key]
        names = {name for _, name in self.gone}.union(*self.replicas.values())
        for name in self._counted.keys() - names:
            del self._counted[name]

    def _count_anew(self, stats: ReplicaStats) -> Counter[str]:
        """What a replica has done since it was counted last."""
        counted = counts_of(stats)
        recent = counted - self._counted.get(stats.replica, Counter())
        self._counted[stats.replica] = counted
        return recent

    def _end_slot(self, replicas: Mapping[str, Sequence[ReplicaStats]], now_s: float) -> None:
        pools = {pool: self._sum_pool(pool, of_pool) for pool, of_pool in replicas.items()}
        own, before = self._count(), self._own
        told = ClientSlot(
            _difference(own.clients.ttft_s.counts, before.clients.ttft_s.counts),
            _difference(own.clients.itl_s.counts, before.clients.itl_s.counts),
            Counter(own.refusals) - Counter(before.refusals),
        )
        number, seconds = int(self._slot_began_s // SLOT_S), now_s - self._slot_began_s
        self.slots.append(Slot(number, seconds, pools, told))
        self._own, self._slot_began_s = own, now_s

    def _sum_pool(self, pool: str, replicas: Sequence[ReplicaStats]) -> PoolSlot:
        done = self._left.pop(pool, Counter())
        for stats in replicas:
            recent = self._count_anew(stats)
            known = self.replicas[pool][stats.replica]
            self.replicas[pool][stats.replica] = KnownReplica(known.stats, known.heard_s, recent)
            done += recent
        engines = [stats.engine for stats in replicas]
        return PoolSlot(
            done,
            len(engines),
            sum(engine.num_queued_prompt_tokens for engine in engines),
            sum(engine.num_waiting for engine in engines),
            sum(engine.num_running for engine in engines),
            sum(engine.num_blocks for engine in engines),
            sum(engine.num_used_blocks for engine in engines),
        )


def counts_of(stats: ReplicaStats) -> Counter[str]:
    """What a replica has counted since it started, by the names above."""
    engine, handoff = stats.engine, stats.handoff
    counted = {name: getattr(engine, name) for name in ENGINE_COUNTS}
    counted |= {name: getattr(handoff, name) for name in HANDOFF_COUNTS}
    return Counter(counted | {f"{PROMPTS}{where}": count for where, count in stats.prompts.items()})


def _sum(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple([a + b for a, b in zip(left, right, strict=True)])


def _difference(now: Sequence[int], before: Sequence[int]) -> tuple[int, ...]:
    return tuple([a - b for a, b in zip(now, before, strict=True)])
