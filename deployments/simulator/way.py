"""The way of a request through the pools: a seat, its prompt, the hand-off, its answer; and back, if an engine fails.

Knows neither admission nor scaling: `service` lets requests in and reads the pools.
"""

import random
from collections.abc import Callable

import simpy

from deployments.load.reading import PREFILL
from deployments.simulator.cache import ModelledCache
from deployments.simulator.gaps import Gaps
from deployments.simulator.machine import Machine
from deployments.simulator.pools import Call, Pool, PoolSetup, Replica
from deployments.simulator.requests import BLOCK_SIZE
from deployments.simulator.sequences import Answer

# Share of a KV pool that a new sequence must leave free, as `engine/scheduling/scheduler.py` has it.
_WATERMARK = 0.01
# Where every replica of a pool has failed, a request asks again after so long.
_RETRY_S = 0.5


class Way:
    """Both pools, and the requests in them.

    Args:
        env: keeps the time.
        decode: setup of this pool.
        prefill: of this one; None: colocated.
        itl_s: gaps between tokens are late that are longer.
        call_s: a request takes beside the engines until its first token is with the client.
        tier_blocks: of the shared tier; 0: there is none.
        draw: chooses replicas, and when they fail.
        ended: told of each request that has ended.
        machine: whose cores all engines share; None: each has its own.

    Attributes:
        gaps: between tokens, of all requests.
        num_unplaced: requests that were let in and have found no decode replica: they ask again.
    """

    def __init__(
        self,
        env: simpy.Environment,
        decode: PoolSetup,
        prefill: PoolSetup | None,
        itl_s: float,
        call_s: float,
        tier_blocks: int,
        draw: random.Random,
        ended: Callable[[Call], None],
        machine: Machine | None = None,
    ) -> None:
        self._env = env
        self._draw = draw
        self._call_s = call_s
        self._ended = ended
        self._tier = ModelledCache(tier_blocks) if tier_blocks else None
        self.gaps = Gaps()
        self.num_unplaced = 0

        def pool(name: str, setup: PoolSetup) -> Pool:
            return Pool(name, setup, env, itl_s, self.gaps, draw, self._take_back, machine)

        self.decode = pool("decode", decode)
        self.prefill = None if prefill is None else pool(PREFILL, prefill)

    def begin(self, call: Call) -> None:
        """A request was let in, or has lost its replica."""
        replica = call.replica = self.decode.find(call.routed.route.decode, self._draw)
        if replica is None:
            self.num_unplaced += 1
            self._env.timeout(_RETRY_S).callbacks.append(lambda _: self._begin_again(call))
            return
        replica.calls.add(call)
        replica.waiting.append(call)
        self._seat(replica)

    def _begin_again(self, call: Call) -> None:
        self.num_unplaced -= 1
        self.begin(call)

    def _seat(self, replica: Replica) -> None:
        """Whoever waits and has room goes on."""
        engine, waiting = replica.engine, replica.waiting
        num_blocks = engine.stats.num_blocks
        while waiting:
            call = waiting[0] if len(waiting) == 1 else min(waiting, key=_precedence_of)
            wanted = -(-call.rest.prompt_tokens // BLOCK_SIZE)
            num_seated = replica.num_open - len(waiting)
            has_room = engine.held_blocks + wanted <= num_blocks * (1.0 - _WATERMARK)
            if num_seated >= engine.stats.max_num_seqs or (num_seated and not has_room):
                return
            waiting.remove(call)
            for other in waiting:
                if other.number < call.number and not call.is_sent_back:
                    other.num_overtaken += call.rest.prompt_tokens
            call.num_blocks = wanted
            engine.prompt_blocks += wanted
            engine.cache.make_room(engine.held_blocks)
            self._fill(replica, call)

    def _fill(self, replica: Replica, call: Call) -> None:
        """Have a prompt computed: here or by the prefill pool."""
        rest, engine = call.rest, replica.engine
        found = engine.cache.find(rest.chain, rest.prompt_tokens)
        is_remote = call.is_remote and call.least is not None and rest.prompt_tokens - found >= call.least
        source = self.prefill.find(call.routed.route.prefill, self._draw) if is_remote and self.prefill else None
        if source is None:
            self._compute(replica, call, lambda: self._go_on(call))
            return
        replica.num_reserved += 1
        engine.stats.prefix_hit_tokens += found
        call.source = source
        source.calls.add(call)

        def computed() -> None:
            self._leave_source(call)
            source.engine.stats.finished += 1
            self._hand_over(source, call, rest.prompt_tokens - found)

        self._compute(source, call, computed)

    def _leave_source(self, call: Call) -> None:
        source, call.source = call.source, None
        if source is not None and self.prefill is not None:
            source.calls.discard(call)
            self.prefill.leave_if_empty(source)

    def _compute(self, replica: Replica, call: Call, done: Callable[[], None]) -> None:
        """Have an engine compute a prompt, once what the shared tier has of it is there."""
        rest, turn, engine = call.rest, call.turn, replica.engine

        def computed() -> None:
            if self._tier is not None:
                self._tier.keep(rest.chain, 0)
            if call.turn == turn:
                done()

        def brought(_: simpy.Event | None) -> None:
            if call.turn == turn:
                engine.cache.keep(rest.chain[: in_tier // BLOCK_SIZE], engine.held_blocks)
                engine.compute(rest, computed)

        in_tier = 0 if self._tier is None else self._tier.find(rest.chain, rest.prompt_tokens)
        num_brought = in_tier - engine.cache.find(rest.chain, rest.prompt_tokens) if in_tier else 0
        if num_brought <= 0:
            engine.compute(rest, computed)
            return
        self._env.timeout(engine.curves.tier_token_s * num_brought).callbacks.append(brought)

    def _hand_over(self, source: Replica, call: Call, num_tokens: int) -> None:
        curves, turn, replica = source.engine.curves, call.turn, call.replica
        assert replica is not None
        last = min(num_tokens, curves.max_num_batched_tokens)
        seconds = curves.handoff_s + curves.handoff_token_s * last
        source.handoff.observe(-(-num_tokens // BLOCK_SIZE), 0, seconds)
        self._note_first_token(call)

        def arrived(_: simpy.Event) -> None:
            if call.turn == turn:
                replica.num_reserved -= 1
                replica.engine.cache.keep(call.rest.chain, replica.engine.held_blocks)
                self._generate(call)

        self._env.timeout(seconds).callbacks.append(arrived)

    def _go_on(self, call: Call) -> None:
        self._note_first_token(call)
        self._generate(call)

    def _note_first_token(self, call: Call) -> None:
        """Of what was left, which is the request's first one unless it was sent back."""
        call.drawn_in = call.turn
        if call.request.ttft_s is not None:
            return
        call.since_s = self._env.now
        call.request.ttft_s = self._env.now - call.request.at_s + self._call_s
        call.ticket.first_token(0)
        call.routed.first_token()

    def _generate(self, call: Call) -> None:
        replica, rest = call.replica, call.rest
        assert replica is not None

        def sent_back(num_drawn: int) -> None:
            replica.engine.prompt_blocks -= call.num_blocks
            call.since_s = self._env.now
            call.go_on_behind(num_drawn)
            call.is_sent_back = True
            replica.waiting.append(call)
            self._seat(replica)

        if rest.output_tokens > 1:
            replica.engine.answer(Answer(rest, lambda: self._end(call), sent_back, call.since_s))
        else:
            replica.engine.stats.finished += 1
            replica.engine.stats.generated_tokens += 1
            self._end(call)

    def _end(self, call: Call) -> None:
        replica = call.replica
        assert replica is not None
        replica.calls.discard(call)
        replica.engine.prompt_blocks -= call.num_blocks
        self._close(call)
        self._seat(replica)
        self.decode.leave_if_empty(replica)

    def _close(self, call: Call) -> None:
        request, rest = call.request, call.rest
        request.end_s = self._env.now
        if rest is not request:
            request.gaps_over += rest.gaps_over
        call.ticket.close()
        call.routed.ended()
        self._ended(call)

    def _take_back(self, replica: Replica) -> None:
        """A replica has failed: its requests go on elsewhere, from the tokens that they have."""
        num_drawn = replica.engine.fail()
        for call in sorted(replica.calls, key=lambda call: call.number):
            if call.source is replica:
                self._compute_here(call)
                continue
            drawn = num_drawn.get(id(call.rest), int(call.drawn_in == call.turn))
            self._leave_source(call)
            if drawn:
                call.since_s = self._env.now
            if drawn >= call.rest.output_tokens:
                call.turn += 1
                self._close(call)
                continue
            call.go_on_behind(drawn)
            call.is_sent_back = False
            self.begin(call)

    def _compute_here(self, call: Call) -> None:
        """The prefill replica has failed: decode computes the prompt itself."""
        replica = call.replica
        assert replica is not None
        call.turn += 1
        call.source = None
        replica.num_reserved -= 1
        self._compute(replica, call, lambda: self._go_on(call))


def _precedence_of(call: Call) -> tuple[bool, int, int]:
    return call.precedence
