"""A modelled service: one ingress, both pools, hand-offs between them, replicas that start and leave.

Admission and the routers are the project's own, told once a second how the engines are; the number of replicas follows
whoever scales. A replica costs from when it is asked for until its last request has left it.
"""

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import simpy

from deployments.errors import OverloadedError, RequestTooLargeError
from deployments.load.admission import Admission, Bounds
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.messages import ANYWHERE, Priority
from deployments.routing.crossover import Crossover, Goals
from deployments.routing.hashes import PromptHashes
from deployments.routing.pools import PoolRouters, RoutedRequest
from deployments.routing.settings import RoutingSettings
from deployments.simulator.pools import Call, Pool, PoolSetup, PoolState, Replica
from deployments.simulator.requests import BLOCK_SIZE, Request

_READ_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Setup:
    """The service, and what it is to keep.

    Attributes:
        decode: pool.
        prefill: pool; None: colocated.
        ttft_s: bound of the time to first token; also of admission's estimate.
        itl_s: bound of the gaps between tokens.
        min_remote_tokens: prompts with fewer uncached tokens are computed by decode; None: by what was measured.
        by_prefix: replicas are chosen by the project's routers; else as Ray Serve does.
        seed: of what Ray Serve draws.
    """

    decode: PoolSetup
    prefill: PoolSetup | None
    ttft_s: float
    itl_s: float
    min_remote_tokens: int | None = None
    by_prefix: bool = True
    seed: int = 0


class Scaler(Protocol):
    """Chooses how many replicas there are."""

    period_s: float

    def decide(self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int) -> dict[str, int]:
        """Targets by pool; calls refused since the last time are told."""
        ...


class Service:
    """Plays requests.

    Args:
        setup: the service.
        scaler: chooses how many replicas there are.
    """

    def __init__(self, setup: Setup, scaler: Scaler) -> None:
        self.setup = setup
        self.env = simpy.Environment()
        self.decode = Pool(DECODE, setup.decode, self.env, setup.itl_s)
        self.prefill = None
        if setup.prefill is not None:
            self.prefill = Pool(PREFILL, setup.prefill, self.env, setup.itl_s)
        self.pools = {DECODE: self.decode} | ({} if self.prefill is None else {PREFILL: self.prefill})
        crossover, least = None, None
        if setup.prefill is not None:
            crossover = Crossover(Goals(setup.ttft_s, setup.itl_s), setup.min_remote_tokens)
            least = crossover.default_tokens
        self._routers = PoolRouters(RoutingSettings(by_prefix=setup.by_prefix), crossover, clock=self._clock)
        self._admission = Admission(Bounds(setup.ttft_s, 100_000_000, least), self._clock, self._routers.is_remote)
        self._least = least
        self._scaler = scaler
        self._draw = random.Random(setup.seed)
        self._num_refused = 0
        self._numbers = count()
        self.reading = Reading({}, 0.0)
        self.is_over = False

    def _clock(self) -> float:
        return float(self.env.now)

    def play(self, requests: Sequence[Request]) -> float:
        """Play all of them; returns when the last one has ended, in seconds from the beginning."""
        for pool in self.pools.values():
            pool.scale(pool.setup.initial, 0.0)
        self._read()
        self.env.process(self._read_on())
        self.env.process(self._scale_on())
        arrivals = self.env.process(self._arrive(requests))
        self.env.run(until=arrivals)
        end_s, self.is_over = float(self.env.now), True
        for pool in self.pools.values():
            pool.is_over = True
            pool.gpu_s += sum(end_s - replica.asked_s for replica in pool.replicas.values())
        while any(replica.num_open for pool in self.pools.values() for replica in pool.replicas.values()):
            self.env.step()
        return end_s

    def _arrive(self, requests: Sequence[Request]) -> Generator[simpy.Event, None, None]:
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

    def _scale_on(self) -> Generator[simpy.Event, None, None]:
        while not self.is_over:
            states = {name: pool.state for name, pool in self.pools.items()}
            targets = self._scaler.decide(self.reading, states, self.env.now, self._num_refused)
            self._num_refused = 0
            for name, pool in self.pools.items():
                pool.scale(targets[name], pool.setup.start_s)
                pool.history.append((self.env.now, pool.target, len(pool.ready)))
            yield self.env.timeout(self._scaler.period_s)

    def _come(self, request: Request) -> None:
        """A request comes to the ingress."""
        try:
            ticket = self._admission.admit([request.prompt_tokens], Priority.HIGH, b"")
        except (OverloadedError, RequestTooLargeError):
            request.is_refused = True
            self._num_refused += 1
            return
        routed = self._route(request)
        least = routed.route.min_remote_tokens
        call = Call(request, ticket, routed, self._least if least is None else least)
        replica = call.replica = self.decode.find(call.routed.route.decode, self._draw)
        replica.num_open += 1
        call.num_blocks = -(-(request.prompt_tokens + request.output_tokens) // BLOCK_SIZE)
        replica.waiting.append(call)
        self._seat(replica)

    def _route(self, request: Request) -> RoutedRequest:
        number = next(self._numbers)
        if not self.setup.by_prefix:
            return RoutedRequest(ANYWHERE, (), self._clock)
        prompt = PromptHashes.known(request.prompt_tokens, {BLOCK_SIZE: list(request.chain)}, (number,))
        return self._routers.route_prompt(str(number), prompt, request.output_tokens)

    def _seat(self, replica: Replica) -> None:
        """Whoever waits and has room goes on."""
        engine = replica.engine
        curves = self.setup.decode.curves
        while replica.waiting:
            call = replica.waiting[0]
            num_seated = replica.num_open - len(replica.waiting)
            has_room = engine.held_blocks + call.num_blocks <= engine.stats.num_blocks
            if num_seated >= curves.max_num_seqs or (num_seated and not has_room):
                return
            replica.waiting.pop(0)
            engine.held_blocks += call.num_blocks
            engine.cache.make_room(engine.held_blocks)
            self._fill(replica, call)

    def _fill(self, replica: Replica, call: Call) -> None:
        """Have a prompt computed: here or by the prefill pool."""
        request, engine = call.request, replica.engine
        found = engine.cache.find(request.chain, request.prompt_tokens)
        if self.prefill is None or call.least is None or request.prompt_tokens - found < call.least:
            engine.compute(request, lambda: self._go_on(call))
            return
        replica.num_reserved += 1
        engine.stats.prefix_hit_tokens += found
        source = self.prefill.find(call.routed.route.prefill, self._draw)
        source.num_open += 1

        def computed() -> None:
            source.num_open -= 1
            source.engine.stats.finished += 1
            self._hand_over(source, call, request.prompt_tokens - found)
            if self.prefill is not None:
                self.prefill.leave_if_empty(source)

        source.engine.compute(request, computed)

    def _hand_over(self, source: Replica, call: Call, num_tokens: int) -> None:
        curves = self.setup.decode.curves
        last = min(num_tokens, curves.max_num_batched_tokens)
        seconds = curves.handoff_s + curves.handoff_token_s * last
        source.handoff.observe(-(-num_tokens // BLOCK_SIZE), 0, seconds)
        self._note_first_token(call)

        def arrived(_: simpy.Event) -> None:
            replica = call.replica
            assert replica is not None
            replica.num_reserved -= 1
            replica.engine.cache.keep(call.request.chain, replica.engine.held_blocks)
            call.request.gaps_over += seconds > self.setup.itl_s
            self._generate(call)

        self.env.timeout(seconds).callbacks.append(arrived)

    def _go_on(self, call: Call) -> None:
        self._note_first_token(call)
        self._generate(call)

    def _note_first_token(self, call: Call) -> None:
        call.request.ttft_s = self.env.now - call.request.at_s
        call.ticket.first_token(0)
        call.routed.first_token()

    def _generate(self, call: Call) -> None:
        assert call.replica is not None
        if call.request.output_tokens > 1:
            call.replica.engine.answer(call.request, lambda: self._end(call))
        else:
            call.replica.engine.stats.finished += 1
            call.replica.engine.stats.generated_tokens += 1
            self._end(call)

    def _end(self, call: Call) -> None:
        replica = call.replica
        assert replica is not None
        call.request.end_s = self.env.now
        replica.num_open -= 1
        replica.engine.held_blocks -= call.num_blocks
        call.ticket.close()
        call.routed.ended()
        self._seat(replica)
        self.decode.leave_if_empty(replica)
