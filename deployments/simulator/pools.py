"""The replicas of a modelled service: how they start, fail, leave, and what they say of themselves."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import simpy

from deployments.load.admission import Ticket
from deployments.load.reading import DECODE
from deployments.replica_stats import HandoffStats, Positions, ReplicaStats
from deployments.routing.pools import RoutedRequest
from deployments.simulator.curves import Curves
from deployments.simulator.engine import ModelledEngine
from deployments.simulator.gaps import Gaps
from deployments.simulator.machine import Machine
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
        failure_s: mean time until a replica fails, by chance; its requests go on elsewhere, and another one starts.
    """

    curves: Curves
    start_s: float = 60.0
    least: int = 1
    most: int = 64
    initial: int = 1
    cost: float = 1.0
    failure_s: float = math.inf


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
    """One replica; `waiting` are requests without a seat, `calls` all that have something to do with it."""

    name: str
    engine: ModelledEngine
    asked_s: float
    is_ready: bool = False
    is_leaving: bool = False
    num_reserved: int = 0
    waiting: list["Call"] = field(default_factory=list)
    calls: set["Call"] = field(default_factory=set)
    handoff: HandoffStats = field(default_factory=HandoffStats)

    @property
    def num_open(self) -> int:
        """Requests that it has."""
        return len(self.calls)


@dataclass(eq=False, slots=True)
class Call:
    """A request that was let in, on its way; with `least` tokens that decode lacks it is computed elsewhere.

    Attributes:
        number: in the order in which they came.
        rest: what is still to be done: behind what was drawn before it was sent back, or its replica failed.
        turn: grows whenever that happens, so that nobody goes on with what is no longer so.
        since_s: when its last token came.
        drawn_in: the turn in which its prompt was computed last.
        replica: of the decode pool.
        source: of the prefill pool, while that computes its prompt.
        num_blocks: that its prompt holds at `replica`.
        num_overtaken: tokens of later prompts that were seated before it.
        is_sent_back: it gave way, and comes before all others.
    """

    request: Request
    ticket: Ticket
    routed: RoutedRequest
    least: int | None
    number: int
    rest: Request
    turn: int = 0
    since_s: float = 0.0
    drawn_in: int = -1
    replica: Replica | None = None
    source: Replica | None = None
    num_blocks: int = 0
    num_overtaken: int = 0
    is_sent_back: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether its prompt is computed elsewhere, unless something of it is cached."""
        return not self.is_sent_back and self.least is not None and self.rest.prompt_tokens >= self.least

    @property
    def precedence(self) -> tuple[bool, int, int]:
        """As prompts have it in an engine."""
        whole = self.rest.prompt_tokens
        if self.is_sent_back or self.num_overtaken >= whole:
            return False, self.number, 0
        return True, whole, self.number

    def go_on_behind(self, num_drawn: int) -> None:
        """So many tokens of what was left are drawn; the rest is to be done anew, elsewhere or later."""
        rest = self.rest
        self.turn += 1
        if rest is not self.request:
            self.request.gaps_over += rest.gaps_over
        prompt_tokens, output_tokens = rest.prompt_tokens + num_drawn, rest.output_tokens - num_drawn
        self.rest = Request(rest.at_s, prompt_tokens, output_tokens, rest.chain)


class Pool:
    """The replicas of one pool.

    Args:
        name: of it.
        setup: of it.
        env: keeps the time.
        gap_bound_s: gaps between tokens are counted that are longer.
        gaps: takes all gaps between tokens.
        draw: when replicas fail.
        failed: told of a replica that has failed, once another one is on its way.
        machine: whose cores its engines share; None: each has its own.

    Attributes:
        gpu_s: of replicas that have left.
        is_over: no more is counted.
        history: when how many replicas it was to have, and how many served.
    """

    def __init__(
        self,
        name: str,
        setup: PoolSetup,
        env: simpy.Environment,
        gap_bound_s: float,
        gaps: Gaps,
        draw: random.Random,
        failed: Callable[[Replica], None],
        machine: Machine | None,
    ) -> None:
        self.name = name
        self.setup = setup
        self.is_over = False
        self.replicas: dict[str, Replica] = {}
        self.gpu_s = 0.0
        self.target = 0
        self.history: list[tuple[float, int, int]] = []
        self._env = env
        self._gap_bound_s = gap_bound_s
        self._gaps = gaps
        self._draw = draw
        self._failed = failed
        self._machine = machine
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
        engine = ModelledEngine(env, self.setup.curves, self._gap_bound_s, self._gaps, self._machine)
        replica = Replica(f"{self.name}{next(self._names)}", engine, env.now)
        self.replicas[replica.name] = replica

        def ready(_: simpy.Event | None) -> None:
            replica.is_ready = True
            if self.setup.failure_s < math.inf:
                self._env.timeout(self._draw.expovariate(1.0 / self.setup.failure_s)).callbacks.append(fails)

        def fails(_: simpy.Event) -> None:
            if not self.is_over and replica.name in self.replicas:
                self._fail(replica)

        if start_s > 0:
            env.timeout(start_s).callbacks.append(ready)
        else:
            ready(None)

    def _fail(self, replica: Replica) -> None:
        self._remove(replica)
        if not replica.is_leaving:
            self._start(self.setup.start_s)
        self._failed(replica)

    def leave_if_empty(self, replica: Replica) -> None:
        if replica.is_leaving and not replica.num_open and replica.name in self.replicas:
            self._remove(replica)

    def _remove(self, replica: Replica) -> None:
        if not self.is_over:
            self.gpu_s += self._env.now - replica.asked_s
        del self.replicas[replica.name]

    def find(self, name: str, draw: random.Random) -> Replica | None:
        """The named replica, else the less busy of two; None: all have failed."""
        replica = self.replicas.get(name)
        if replica is not None and replica.is_ready and not replica.is_leaving:
            return replica
        ready = self.ready
        if not ready:
            return None
        return min(draw.sample(ready, min(2, len(ready))), key=lambda r: r.num_open)

    def read(self, positions: Positions | None) -> list[ReplicaStats]:
        """What its replicas say."""
        return [self._read(replica, positions) for replica in self.ready]

    def _read(self, replica: Replica, positions: Positions | None) -> ReplicaStats:
        engine, waiting = replica.engine, replica.waiting
        stats = engine.report()
        own = sum(c.rest.prompt_tokens for c in waiting)
        remote = sum(c.rest.prompt_tokens for c in waiting if c.is_remote)
        stats.num_queued_prompt_tokens = own + engine.queued_tokens
        stats.num_remote_prompt_tokens = remote
        stats.num_waiting = len(waiting) if self.name == DECODE else max(0, engine.num_prompts - 1)
        stats.num_reserved = replica.num_reserved
        stats.num_running = engine.num_answers + (engine.num_prompts if self.name == DECODE else 1)
        stats.num_used_blocks = round(engine.held_blocks)
        cache = None if positions is None else engine.cache.log.since(positions.get(replica.name))
        return ReplicaStats(replica.name, stats, replica.handoff.copy(), 0.0, cache)
