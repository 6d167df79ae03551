"""Turns readings of both pools into what the planner decides by, one after the other.

Owns what is learned from them: how much comes and how unevenly, what prompts and steps cost, how long a replica takes
to start. Costs it learns as admission does (`load/outlook.py`, `load/step_cost.py`), from steps that run anyway.
Replicas that have just started teach no costs and no tails: their first steps load, compile, and wait for first
contacts. Pure: no clock.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.engine.stats import EngineStats
from deployments.load.decode_steps import decode_steps_between
from deployments.load.held import Held
from deployments.load.outlook import PoolReadings
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.planner.flow import Flow
from deployments.planner.gap_learner import GapLearner
from deployments.planner.observation import Answers, Observation, PoolSeen, Prompts
from deployments.planner.replicas import Progress, Replicas
from deployments.planner.settings import PlannerSettings
from deployments.planner.windows import HandedOn, MeanLength, QueueAge, Share, TailWindow

_OUTPUT_HALF_LIFE = 64.0  # finished requests
# What answers are taken to have before any has ended, as firmly as if so many had.
_OUTPUT_BELIEVED, _OUTPUT_WEIGHT = 256.0, 4.0
_PROMPT_HALF_LIFE = 256.0  # requests
_MISS_HALF_LIFE = 262_144.0  # prompt tokens
# What ingresses held engines have told of by then: both tell once a second, and a first step may take a while.
_HANDED_ON_S = 10.0


class _Pool:
    """One pool, as far as it computes prompts."""

    def __init__(self, settings: PlannerSettings, tail_bound_s: float) -> None:
        self.replicas = Replicas(settings.start_s)
        self.costs = PoolReadings(counts_hits=False)
        self.tail = TailWindow(tail_bound_s)
        self._tokens = Flow(max(1.0, settings.ttft_s))
        self._misses = Share(_MISS_HALF_LIFE)
        self._per_request = Share(_PROMPT_HALF_LIFE)
        self._queue = QueueAge()
        self._handed_on = HandedOn(_HANDED_ON_S)
        self._came = self.queued = self._held = self._seatless = self._of_others = self._oldest_s = 0.0

    def take(self, engines: Mapping[str, EngineStats], as_of_s: float, at_s: float) -> list[Progress]:
        """A reading: what it says of costs is learned."""
        progress = self.replicas.take(engines, as_of_s, at_s)
        warm = {name: stats for name, stats in engines.items() if self.replicas.is_warm(name, at_s)}
        self.costs.update(warm, as_of_s)
        return progress

    def count_prompts(self, computed: int, found: int, queued: int, at_s: float, held: int = 0) -> float:
        """Prompt tokens that came since the last reading, by those computed, found, waiting now, and held."""
        self._misses.add(computed, computed + found)
        at_engines = max(0.0, computed + found + queued - self.queued)
        self.queued, self._held = float(queued), float(held)
        return self._handed_on.came(held, at_engines, at_s)

    def take_prompts(
        self, came: float, requests: "_Came", elapsed_s: float, at_s: float, seatless: int = 0, of_others: float = 0.0
    ) -> None:
        """So many prompt tokens came; of those that wait some have no seat, and some are another pool's to compute."""
        self._seatless, self._of_others = float(seatless), of_others
        came = came if elapsed_s > 0 else 0.0
        self._per_request.add(came, requests.seen)
        self._tokens.add(came + requests.refused * self._per_request.value(0.0), elapsed_s)
        self._came += came
        self._oldest_s = self._queue.age(self._came, self._came - self.queued - self._held, at_s)

    def queued_here(self) -> int:
        """Prompt tokens that wait for engines of this pool, in it."""
        return sum(s.num_queued_prompt_tokens - s.num_remote_prompt_tokens for s in self.replicas.stats.values())

    @property
    def prompts(self) -> Prompts:
        tokens = self.costs.tokens_per_step
        token_s = self.costs.cost.seconds(1.0, tokens).best / tokens
        return Prompts(
            self._tokens.rate,
            self._misses.value(1.0),
            self.queued + self._held - self._of_others,
            self._seatless,
            self._oldest_s,
            token_s,
        )


@dataclass(frozen=True, slots=True)
class _Came:
    """Requests that came since the last reading: those that engines have seen, and those that were refused."""

    seen: int
    refused: int


class Observer:
    """See the module.

    Args:
        settings: of the planner.
        is_colocated: there is no prefill pool.
    """

    def __init__(self, settings: PlannerSettings, is_colocated: bool) -> None:
        self._decode = _Pool(settings, settings.itl_s)
        self._prefill = None if is_colocated else _Pool(settings, settings.ttft_s)
        self._gaps = GapLearner()
        self._output = MeanLength(_OUTPUT_BELIEVED, _OUTPUT_WEIGHT, _OUTPUT_HALF_LIFE)
        self._requests = Flow(max(1.0, settings.ttft_s))
        self._decode_share = Share(_MISS_HALF_LIFE)  # of prompt tokens, with enough prefill replicas
        self._handed_on = HandedOn(_HANDED_ON_S)
        self._held, self._num_new = Held(), 0
        self._max_seqs = 1  # seats of an engine; as was seen last, for it is asked for while there is none
        self._at_s = -math.inf

    def note_asked(self, pool: str, num_more: int, at_s: float) -> None:
        """So many more replicas of a pool were asked for, or fewer."""
        asked = self._decode if pool == DECODE else self._prefill
        if asked is not None:
            asked.replicas.note_asked(num_more, at_s)

    def note_held(self, held: Held) -> None:
        """What ingresses hold now, since there is no decode engine."""
        self._held = held

    def observe(self, reading: Reading, at_s: float, num_refused: int = 0) -> Observation:
        """Take a reading.

        Args:
            reading: of both pools.
            at_s: the time, on the clock of the reading.
            num_refused: calls that were refused since the last one, of which no engine knows.
        """
        elapsed_s = at_s - self._at_s if self._at_s > -math.inf else 0.0
        self._at_s = at_s
        self._adopt(reading)
        progress = self._decode.take(reading.pools[DECODE], reading.as_of_s, at_s)
        at_engines = max(0, sum(_num_seen(p.now) - _num_seen(p.before) for p in progress))
        requests = _Came(round(self._handed_on.came(self._held.count, at_engines, at_s)), num_refused)
        self._num_new = requests.seen + requests.refused
        self._requests.add(self._num_new if elapsed_s > 0 else 0, elapsed_s)
        self._learn_answers(progress, elapsed_s)
        computed, found = _computed(progress)
        queued = self._decode.queued_here()
        if self._prefill is None:
            came = self._decode.count_prompts(computed, found, queued, at_s, self._held.tokens)
            self._decode.take_prompts(came, requests, elapsed_s, at_s)
            return Observation(at_s, self._see_decode())
        if reading.pools[PREFILL]:
            here = self._decode.count_prompts(computed, 0, queued, at_s)
            self._take_prompts(self._prefill, reading, here, requests, elapsed_s, at_s)
        else:
            # Decode computes them all; what they would keep busy is prefill's to tell.
            self._decode.take_prompts(self._decode.count_prompts(0, 0, 0, at_s), requests, elapsed_s, at_s)
            self._prefill.take({}, reading.as_of_s, at_s)
            came = self._prefill.count_prompts(computed, found, queued, at_s, self._held.tokens)
            self._prefill.take_prompts(came, requests, elapsed_s, at_s)
        return Observation(at_s, self._see_decode(), self._see_prefill(self._prefill))

    def _see_prefill(self, pool: _Pool) -> PoolSeen:
        prompts, engines = pool.prompts, pool.replicas.stats
        if not engines and not prompts.token_s:
            prompts = replace(prompts, token_s=self._decode.prompts.token_s)
        return PoolSeen(len(engines), pool.replicas.start_s, prompts, None, pool.tail.value)

    def _adopt(self, reading: Reading) -> None:
        """Replicas that have changed their role since the last reading."""
        if self._prefill is None:
            return
        for name, to, of in ((PREFILL, self._prefill, self._decode), (DECODE, self._decode, self._prefill)):
            for replica in reading.pools[name].keys() & of.replicas.stats.keys():
                to.costs.join(replica, of.replicas.stats[replica])
                to.replicas.adopt(replica, of.replicas)

    def _learn_answers(self, progress: list[Progress], elapsed_s: float) -> None:
        self._decode.tail.pass_time(elapsed_s)
        self._gaps.pass_time(elapsed_s)
        for p in progress:
            self._output.add(p.now.generated_tokens - p.before.generated_tokens, p.now.finished - p.before.finished)
            if p.is_warm:
                self._decode.tail.add(p.now.itl_s, p.before.itl_s)
                if (steps := decode_steps_between(p.now, p.before)) is not None:
                    each = steps.seconds / steps.steps
                    self._gaps.add(steps.sequences / steps.steps, _kv_read(p.now), each, steps.seconds)
        engines = [p.now for p in progress]
        self._output.note_running(
            sum(engine.num_running for engine in engines),
            sum(engine.num_drawn_tokens for engine in engines),
            sum(engine.num_running + engine.num_reserved + engine.num_waiting for engine in engines),
            sum(engine.num_allowed_tokens for engine in engines),
        )

    def _take_prompts(
        self, pool: _Pool, reading: Reading, here: float, requests: _Came, elapsed_s: float, at_s: float
    ) -> None:
        """A reading of the prefill pool, while so many prompt tokens came for decode to compute.

        While prefill replicas start, decode takes over prompts of theirs: beyond its usual part they are prefill's.
        """
        progress = pool.take(reading.pools[PREFILL], reading.as_of_s, at_s)
        pool.tail.pass_time(elapsed_s)
        for p in progress:
            if p.is_warm:
                pool.tail.add(p.now.ttft_s, p.before.ttft_s)
        remote = sum(stats.num_remote_prompt_tokens for stats in self._decode.replicas.stats.values())
        there = pool.count_prompts(*_computed(progress), pool.queued_here() + remote, at_s, self._held.tokens)
        taken_over = waiting = 0.0
        if pool.replicas.are_starting(at_s):
            share = self._decode_share.value(1.0)
            taken_over = max(0.0, here - share * (here + there))
            waiting = max(0.0, self._decode.queued - share * (self._decode.queued + pool.queued))
        else:
            self._decode_share.add(here, here + there)
        self._decode.take_prompts(here - taken_over, requests, elapsed_s, at_s, of_others=waiting)
        pool.take_prompts(there + taken_over, requests, elapsed_s, at_s, remote)

    def _see_decode(self) -> PoolSeen:
        pool, engines = self._decode, list(self._decode.replicas.stats.values())
        num_running = sum(engine.num_running for engine in engines)
        num_reserved = sum(engine.num_reserved for engine in engines)
        kv_tokens = sum(engine.num_used_tokens for engine in engines)
        token_s = pool.prompts.token_s or (self._prefill.prompts.token_s if self._prefill is not None else 0.0)
        self._max_seqs = max((engine.max_num_seqs for engine in engines), default=self._max_seqs)
        gaps = self._gaps.curve(token_s, kv_tokens / max(1, num_running + num_reserved))
        answers = Answers(
            self._requests.rate,
            self._output.value,
            gaps,
            num_running,
            sum(engine.num_waiting for engine in engines) + self._held.count,
            sum(map(_num_for_prefill, engines)),
            self._max_seqs,
            _used_share(engines),
            num_reserved,
            self._num_new,
            self._held.count,
        )
        return PoolSeen(len(engines), pool.replicas.start_s, pool.prompts, answers, pool.tail.value)


def _used_share(engines: Sequence[EngineStats]) -> float:
    """Of the blocks of all engines; 0: there are none."""
    num_blocks = sum(engine.num_blocks for engine in engines)
    return sum(engine.num_used_blocks for engine in engines) / num_blocks if num_blocks else 0.0


def _kv_read(engine: EngineStats) -> float:
    """Tokens of KV that a step reads: not that of sequences which wait for theirs."""
    seated = engine.num_running + engine.num_reserved
    return engine.num_used_tokens * engine.num_running / max(1, seated)


def _num_for_prefill(engine: EngineStats) -> int:
    """Of those without a seat, that the prefill pool will compute; by their tokens."""
    return round(engine.num_waiting * engine.num_remote_prompt_tokens / max(1, engine.num_queued_prompt_tokens))


def _num_seen(engine: EngineStats) -> int:
    """Requests that an engine has had."""
    return engine.finished + engine.num_waiting + engine.num_reserved + engine.num_running


def _computed(progress: list[Progress]) -> tuple[int, int]:
    """Prompt tokens that were computed, and found."""
    computed = sum(p.now.prompt_tokens - p.before.prompt_tokens for p in progress)
    found = sum(p.now.prefix_hit_tokens - p.before.prefix_hit_tokens for p in progress)
    return max(0, computed), max(0, found)
