"""The replicas of a modelled service: how they start, wait, leave, and what they say of themselves."""

import random
from dataclasses import dataclass, field
from itertools import count

import simpy

from deployments.load.admission import Ticket
from deployments.load.reading import DECODE
from deployments.replica_stats import HandoffStats, Positions, ReplicaStats
from deployments.routing.pools import RoutedRequest
from deployments.simulator.curves import Curves
from deployments.simulator.engine import ModelledEngine
from deployments.simulator.requests import Request


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """One pool.

    Attributes:
        curves: of its engines.
        start_s: that a replica takes to start.
        least: replicas.
        most: replicas.
        initial: replicas that are there at the beginning.
        cost: of a replica.
    """

    curves: Curves
    start_s: float = 60.0
    least: int = 1
    most: int = 64
    initial: int = 1
    cost: float = 1.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a scaler sees of a pool, beside what its engines say.

    Attributes:
        least: replicas.
        most: replicas.
        target: it has or is getting.
        num_ready: that serve.
        num_ongoing: requests that it has.
    """

    least: int
    most: int
    target: int
    num_ready: int
    num_ongoing: int


@dataclass(eq=False)
class Replica:
    """One replica; `waiting` are requests without a seat, first come first seated."""

    name: str
    engine: ModelledEngine
    asked_s: float
    is_ready: bool = False
    is_leaving: bool = False
    num_open: int = 0
    num_reserved: int = 0
    waiting: list["Call"] = field(default_factory=list)
    handoff: HandoffStats = field(default_factory=HandoffStats)


@dataclass(eq=False, slots=True)
class Call:
    """A request that was let in, on its way; with `least` tokens that decode lacks it is computed elsewhere."""

    request: Request
    ticket: Ticket
    routed: RoutedRequest
    least: int | None
    replica: Replica | None = None
    num_blocks: int = 0

    @property
    def is_remote(self) -> bool:
        """Whether its prompt is computed elsewhere, unless something of it is cached."""
        return self.least is not None and self.request.prompt_tokens >= self.least


class Pool:
    """The replicas of one pool.

    Args:
        name: of it.
        setup: of it.
        env: keeps the time.
        gap_bound_s: gaps between tokens are counted that are longer.

    Attributes:
        gpu_s: of replicas that have left.
        is_over: no more is counted.
        history: when how many replicas it was to have, and how many served.
    """

    def __init__(self, name: str, setup: PoolSetup, env: simpy.Environment, gap_bound_s: float) -> None:
        self.name = name
        self.setup = setup
        self.is_over = False
        self.replicas: dict[str, Replica] = {}
        self.gpu_s = 0.0
        self.target = 0
        self.history: list[tuple[float, int, int]] = []
        self._env = env
        self._gap_bound_s = gap_bound_s
        self._names = count()

    @property
    def ready(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.is_ready and not r.is_leaving]

    @property
    def state(self) -> PoolState:
        setup, ready = self.setup, self.ready
        return PoolState(setup.least, setup.most, self.target, len(ready), sum(r.num_open for r in ready))

    def scale(self, target: int, start_s: float) -> None:
        """Have so many replicas; those that are not needed leave once they are empty."""
        self.target = target = min(max(target, self.setup.least), self.setup.most)
        staying = [r for r in self.replicas.values() if not r.is_leaving]
        for _ in range(target - len(staying)):
            self._start(start_s)
        surplus = len(staying) - target
        for replica in sorted(staying, key=lambda r: (r.is_ready, r.num_open))[: max(0, surplus)]:
            replica.is_leaving = True
            self.leave_if_empty(replica)

    def _start(self, start_s: float) -> None:
        env = self._env
        engine = ModelledEngine(env, self.setup.curves, self._gap_bound_s)
        replica = Replica(f"{self.name}{next(self._names)}", engine, env.now)
        self.replicas[replica.name] = replica

        def ready(_: simpy.Event | None) -> None:
            replica.is_ready = True

        if start_s > 0:
            env.timeout(start_s).callbacks.append(ready)
        else:
            ready(None)

    def leave_if_empty(self, replica: Replica) -> None:
        if replica.is_leaving and not replica.num_open:
            if not self.is_over:
                self.gpu_s += self._env.now - replica.asked_s
            del self.replicas[replica.name]

    def find(self, name: str, draw: random.Random) -> Replica:
        """The named replica, else the less busy of two."""
        replica = self.replicas.get(name)
        if replica is not None and replica.is_ready and not replica.is_leaving:
            return replica
        ready = self.ready
        assert ready, f"nobody is left in {self.name}"
        return min(draw.sample(ready, min(2, len(ready))), key=lambda r: r.num_open)

    def read(self, positions: Positions | None) -> list[ReplicaStats]:
        """What its replicas say."""
        return [self._read(replica, positions) for replica in self.ready]

    def _read(self, replica: Replica, positions: Positions | None) -> ReplicaStats:
        engine, waiting = replica.engine, replica.waiting
        stats = engine.report()
        own = sum(c.request.prompt_tokens for c in waiting)
        remote = sum(c.request.prompt_tokens for c in waiting if c.is_remote)
        stats.num_queued_prompt_tokens = own + engine.queued_tokens
        stats.num_remote_prompt_tokens = remote
        stats.num_waiting = len(waiting) if self.name == DECODE else max(0, engine.num_prompts - 1)
        stats.num_reserved = replica.num_reserved
        stats.num_running = engine.num_answers + (engine.num_prompts if self.name == DECODE else 1)
        stats.num_used_blocks = engine.held_blocks
        cache = None if positions is None else engine.cache.log.since(positions.get(replica.name))
        return ReplicaStats(replica.name, stats, replica.handoff.copy(), 0.0, cache)
