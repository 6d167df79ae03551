"""A modelled service: one ingress, both pools, hand-offs between them, replicas that start and leave.

Admission, the routers and the hold of requests that have no replica are the project's own, told once a second how the
engines are; the number of replicas follows whoever scales. A replica costs from when it is asked for until its last
request has left it.
"""

import random
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import simpy

from deployments.errors import OverloadedError, RequestTooLargeError
from deployments.load.admission import Admission, Bounds, Ticket
from deployments.load.held import Held, HeldRequests, HoldBounds
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.messages import ANYWHERE, Priority
from deployments.routing.crossover import Crossover, Goals
from deployments.routing.hashes import PromptHashes
from deployments.routing.pools import PoolRouters, RoutedRequest
from deployments.routing.settings import RoutingSettings
from deployments.simulator.machine import Machine
from deployments.simulator.pools import Call, PoolSetup, PoolState
from deployments.simulator.requests import BLOCK_SIZE, Request
from deployments.simulator.way import Way

_READ_PERIOD_S = 1.0
# Where all come at once, too, something per second is told.
_LEAST_PLAY_S = 1.0
# As `decode.max_queued_requests` and `ingress.max_start_s` are unless set.
_HOLD = HoldBounds(max_requests=1024, max_s=600.0)


@dataclass(frozen=True, slots=True)
class Setup:
    """The service, and what it is to keep.

    Attributes:
        decode: pool.
        prefill: pool; None: colocated.
        ttft_s: bound of the time to first token; also of admission's estimate.
        itl_s: bound of the gaps between tokens.
        min_remote_tokens: prompts with fewer uncached tokens are computed by decode; None: by what was measured.
        call_s: that a request takes beside the engines, until its first token is with the client.
        shared_slowdown: times that a step takes as long while another engine computes on the cores that all share; 1:
            each engine has its own.
        tier_tokens: that the shared tier holds; 0: there is none.
        hold: who may wait for a decode replica, where there may be none.
        by_prefix: replicas are chosen by the project's routers; else as Ray Serve does.
        seed: of what Ray Serve draws, and of failures.
    """

    decode: PoolSetup
    prefill: PoolSetup | None
    ttft_s: float
    itl_s: float
    min_remote_tokens: int | None = None
    call_s: float = 0.0
    shared_slowdown: float = 1.0
    tier_tokens: int = 0
    hold: HoldBounds = _HOLD
    by_prefix: bool = True
    seed: int = 0


class Scaler(Protocol):
    """Chooses how many replicas there are.

    Attributes:
        period_s: between two choices.
        wakes: it has replicas started for requests that are held; else they wait where Ray Serve has them wait, which
            starts one.
    """

    period_s: float
    wakes: bool

    def decide(
        self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int, held: Held
    ) -> dict[str, int]:
        """Targets by pool; calls refused since the last time are told, and those that are held now."""
        ...


class Service:
    """Plays requests.

    Args:
        setup: the service.
        scaler: chooses how many replicas there are.
        ended: told of each request that has ended or was refused.

    Attributes:
        gaps: between tokens, of all requests.
    """

    def __init__(self, setup: Setup, scaler: Scaler, ended: Callable[[Request], None] = lambda request: None) -> None:
        self.setup = setup
        self.env = simpy.Environment()
        self._way = Way(
            self.env,
            setup.decode,
            setup.prefill,
            setup.itl_s,
            setup.call_s,
            setup.tier_tokens // BLOCK_SIZE,
            random.Random(setup.seed),
            self._end,
            Machine(setup.shared_slowdown) if setup.shared_slowdown > 1.0 else None,
        )
        self.gaps = self._way.gaps
        self.pools = {DECODE: self._way.decode}
        if self._way.prefill is not None:
            self.pools[PREFILL] = self._way.prefill
        crossover, least = None, None
        if setup.prefill is not None:
            may_lack = setup.prefill.least == 0
            crossover = Crossover(Goals(setup.ttft_s, setup.itl_s), setup.min_remote_tokens, may_lack)
            least = crossover.default_tokens
        self._routers = PoolRouters(RoutingSettings(by_prefix=setup.by_prefix), crossover, clock=self._clock)
        self._admission = Admission(Bounds(setup.ttft_s, 100_000_000, least), self._clock, self._routers.is_remote)
        self._least = least
        self._scaler = scaler
        may_sleep = setup.decode.least == 0 and scaler.wakes
        self._held = HeldRequests(setup.hold, lambda: None, self._clock) if may_sleep else None
        self._tell = ended
        self._num_refused = self._num_open = 0
        self._numbers = count()
        self.reading = Reading({}, 0.0)
        self.is_over = False

    def _clock(self) -> float:
        return float(self.env.now)

    def play(self, requests: Iterable[Request]) -> float:
        """Play all of them, which come in order.

        Returns:
            When the last one has come, in seconds from the beginning; 1 at least.
        """
        for pool in self.pools.values():
            pool.scale(pool.setup.initial, 0.0)
        self._read()
        self.env.process(self._read_on())
        self.env.process(self._scale_on())
        arrivals = self.env.process(self._arrive(requests))
        self.env.run(until=arrivals)
        if self.env.now < _LEAST_PLAY_S:
            self.env.run(until=_LEAST_PLAY_S)
        end_s, self.is_over = float(self.env.now), True
        for pool in self.pools.values():
            pool.is_over = True
            pool.gpu_s += sum(end_s - replica.asked_s for replica in pool.replicas.values())
        while self._num_open:
            self.env.step()
        return end_s

    def _arrive(self, requests: Iterable[Request]) -> Generator[simpy.Event, None, None]:
        for request in requests:
            if request.at_s > self.env.now:
                yield self.env.timeout(request.at_s - self.env.now)
            self._come(request)

    def _read_on(self) -> Generator[simpy.Event, None, None]:
        while True:
            yield self.env.timeout(_READ_PERIOD_S)
            self._read()

    def _read(self) -> None:
        pools = {name: pool.read(self._routers.positions(name)) for name, pool in self.pools.items()}
        self.reading = Reading.of(pools, self.env.now)
        self._admission.update(self.reading)
        self._routers.update(self.reading)
        if self._held is not None:
            self._held.update(self.reading)

    @property
    def held(self) -> Held:
        """Requests that wait for a decode replica."""
        return Held() if self._held is None else self._held.now()

    def _scale_on(self) -> Generator[simpy.Event, None, None]:
        while not self.is_over or self.held.count or self._way.num_unplaced:
            states, num_unplaced = {name: pool.state for name, pool in self.pools.items()}, self._way.num_unplaced
            states[DECODE] = replace(states[DECODE], num_ongoing=states[DECODE].num_ongoing + num_unplaced)
            targets = self._scaler.decide(self.reading, states, self.env.now, self._num_refused, self.held)
            self._num_refused = 0
            if num_unplaced and not states[DECODE].num_ready:
                targets[DECODE] = max(1, targets[DECODE])  # Ray Serve starts one by itself
            for name, pool in self.pools.items():
                pool.scale(targets[name], pool.setup.start_s)
                pool.history.append((self.env.now, pool.target, len(pool.ready)))
            yield self.env.timeout(self._scaler.period_s)

    def _come(self, request: Request) -> None:
        """A request comes to the ingress."""
        if request.prompt_tokens + request.output_tokens > self.setup.decode.curves.num_kv_tokens:
            self._refuse(request)  # no engine can ever run it, however many there are
            return
        try:
            ticket = self._admission.admit([request.prompt_tokens], Priority.HIGH, b"")
        except (OverloadedError, RequestTooLargeError):
            self._num_refused += 1
            self._refuse(request)
            return
        self._num_open += 1
        if not self._hold(request, ticket):
            self._send(request, ticket)

    def _refuse(self, request: Request) -> None:
        request.is_refused = True
        self._tell(request)

    def _hold(self, request: Request, ticket: Ticket) -> bool:
        """Have it wait for a decode replica, if there is none; whether that is so, or it may not even wait."""
        held = self._held
        if held is None:
            return False

        def give_up() -> None:
            ticket.close()
            self._num_open -= 1
            self._refuse(request)

        try:
            waiting = held.enter(request.prompt_tokens, lambda: self._send(request, ticket))
        except OverloadedError:
            give_up()
            return True
        if waiting is None:
            return False
        self.env.timeout(held.max_s).callbacks.append(lambda _: give_up() if held.leave(waiting) else None)
        return True

    def _send(self, request: Request, ticket: Ticket) -> None:
        """To a decode replica."""
        routed = self._route(request)
        least = routed.route.min_remote_tokens
        least = self._least if least is None else least
        self._way.begin(Call(request, ticket, routed, least, next(self._numbers), request))

    def _end(self, call: Call) -> None:
        self._num_open -= 1
        self._tell(call.request)

    def _route(self, request: Request) -> RoutedRequest:
        if not self.setup.by_prefix:
            return RoutedRequest(ANYWHERE, (), self._clock)
        number = next(self._numbers)
        prompt = PromptHashes.known(request.prompt_tokens, {BLOCK_SIZE: list(request.chain)}, (number,))
        return self._routers.route_prompt(str(number), prompt, request.output_tokens)
