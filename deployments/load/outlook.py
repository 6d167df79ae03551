"""What the pools' own numbers say about the wait of a prompt that comes now.

Owns the readings of one pool and what is learned from them, one reading after the other: what a step with prompt tokens
costs, and how long a seat is held. Knows nothing of who may come in: `admission.py` decides that with it. Pure: no Ray,
and no clock of its own.
"""

import math
from collections.abc import Collection, Mapping

import msgspec

from deployments.engine.stats import EngineStats
from deployments.load.step_cost import NOTHING, UNKNOWN, Estimate, StepCost

# Busy seconds and finished sequences after which an observation counts half: fast enough to follow a change of traffic,
# slow enough that one long prompt is not taken for one.
_COST_HALF_LIFE_S = 10.0
_HELD_HALF_LIFE = 32.0
_HELD_SPREAD = 2.0
# Older readings say nothing of the queues; costs are still those last seen.
MAX_AGE_S = 10.0


class HoldingTime:
    """The mean time that a sequence holds its seat, from how many finish while seats are held.

    It keeps its value while neither grows, so that an idle engine does not forget it.

    Args:
        half_life: sequences that finish until what was seen before counts half.
    """

    def __init__(self, half_life: float = _HELD_HALF_LIFE) -> None:
        self._half_life = half_life
        self._seat_s = self._finished = 0.0

    def add(self, seat_s: float, finished: int) -> None:
        """So many seconds passed, over all seats that were held, and so many sequences finished meanwhile."""
        keep = 0.5 ** (finished / self._half_life)
        self._seat_s = keep * self._seat_s + seat_s
        self._finished = keep * self._finished + finished

    @property
    def value(self) -> Estimate | None:
        """Per sequence; None: none has finished yet.

        The ends are as if some more or fewer had finished by chance. Not as many as of a Poisson count: where seats are
        scarce, sequences leave them at a steady rate.
        """
        if not self._finished or not self._seat_s:
            return None
        n, seat_s = self._finished, self._seat_s
        high = seat_s / (n - _HELD_SPREAD) if n > _HELD_SPREAD else math.inf
        return Estimate(seat_s / (n + _HELD_SPREAD), seat_s / n, high)


class Outlook(msgspec.Struct, frozen=True, gc=False):
    """What a prompt meets that comes to a pool now.

    Attributes:
        queued_tokens: of prompts before it.
        num_engines: that compute prompts of this pool.
        cost: of a step with prompt tokens in one of them.
        tokens_per_step: at most.
        seat_wait: seconds until there is a seat in a decode engine.
    """

    queued_tokens: float
    num_engines: int
    cost: StepCost
    tokens_per_step: int
    seat_wait: Estimate

    @property
    def speed(self) -> float | None:
        """Prompt tokens per second of one engine in full steps, by the best estimate; None: not measured yet."""
        full_s = self._seconds(self.tokens_per_step, 1.0).best
        return self.tokens_per_step / full_s if full_s else None

    @property
    def is_queue(self) -> bool:
        """Whether anything is before it."""
        return self.queued_tokens > 0 or self.seat_wait.best > 0

    @property
    def wait(self) -> Estimate:
        """Seconds until the prompt's turn comes: both queues are passed at once, so that the slower one decides."""
        return self.drain(self.queued_tokens).or_longer(self.seat_wait)

    def drain(self, num_tokens: float) -> Estimate:
        """Seconds until all engines together have computed so many tokens of full steps."""
        return self._seconds(num_tokens / self.num_engines, self._full_steps(num_tokens / self.num_engines))

    def first_token(self, own_tokens: float) -> Estimate:
        """Seconds until the first token of a prompt that comes now.

        Args:
            own_tokens: of the prompt; they count twice where others wait, see `admission.py`.
        """
        overtaking = min(own_tokens, self.queued_tokens)
        own_steps = max(1.0, self._full_steps(own_tokens)) + self._full_steps(overtaking)
        own = self._seconds(own_tokens + overtaking, own_steps)
        queued = self.queued_tokens / self.num_engines
        # One sum, and not the sum of two estimates: if the steps cost less than is thought they do so in both parts.
        computed = self._seconds(queued + own_tokens + overtaking, self._full_steps(queued) + own_steps)
        return computed.or_longer(self.seat_wait + own)

    def _full_steps(self, num_tokens: float) -> float:
        return num_tokens / self.tokens_per_step

    def _seconds(self, num_tokens: float, num_steps: float) -> Estimate:
        return self.cost.seconds(num_steps, num_tokens)


class PoolReadings:
    """The engines of one pool as they were last seen; in what they cost they are taken to be alike.

    Args:
        counts_hits: cached prompt tokens count as computed. Not where other engines compute what is not cached.

    Attributes:
        as_of_s: what is said was true then or later.
        tokens_per_step: of a full one, as was seen last: it is asked for while a pool has no engine, too.
        cost: of a step.
        num_engines: at least 1: a pool has an engine, whether it was seen or not.
        num_ingresses: ingress replicas that send requests; at least the one that asks.
        own_tokens: prompt tokens queued for engines of this pool.
        remote_tokens: prompt tokens queued here for engines of another pool.
        num_sequences: that wait or have a seat.
    """

    def __init__(self, counts_hits: bool) -> None:
        self._counts_hits = counts_hits
        self._engines: dict[str, EngineStats] = {}
        self.as_of_s = -math.inf
        self.tokens_per_step = 1
        self.cost = StepCost(_COST_HALF_LIFE_S)
        self._held = HoldingTime()
        self._full_s = 0.0  # of a full step, as of the last reading: every request asks for it
        self._add_up(())

    def join(self, name: str, stats: EngineStats) -> None:
        """An engine that was another pool's is one of this: what it has done so far teaches nothing here."""
        self._engines[name] = stats

    def update(self, engines: Mapping[str, EngineStats], as_of_s: float) -> None:
        """Take a reading.

        Args:
            engines: of every replica, by its name.
            as_of_s: what they say was true then or later.
        """
        elapsed_s = max(0.0, as_of_s - self.as_of_s) if self._engines else 0.0
        for name, now in engines.items():
            self._learn_from(now, self._engines.get(name), elapsed_s)
        self._engines = dict(engines)
        self._add_up(engines.values())
        self.as_of_s = as_of_s
        if full := max((engine.max_num_batched_tokens for engine in engines.values()), default=0):
            self.tokens_per_step = full
        self._full_s = self.cost.seconds(1.0, self.tokens_per_step).best

    def _learn_from(self, now: EngineStats, before: EngineStats | None, elapsed_s: float) -> None:
        if before is None:
            self._learn_history(now)
        else:
            self._learn(now, before)
            self._held.add(_seated(now) * elapsed_s, now.finished - before.finished)

    def _add_up(self, engines: Collection[EngineStats]) -> None:
        # Now, and not with every request that asks.
        self.num_engines = max(1, len(engines))
        self.num_ingresses = max([1, *(e.num_receivers for e in engines)])
        self.own_tokens = sum(e.num_queued_prompt_tokens - e.num_remote_prompt_tokens for e in engines)
        self.remote_tokens = sum(e.num_remote_prompt_tokens for e in engines)
        self.num_sequences = sum(e.num_waiting + _seated(e) for e in engines)
        self._num_seats = sum(map(_num_seats, engines))

    def _learn_history(self, now: EngineStats) -> None:
        """Of an engine that is new here. Its first steps are slow, and tell something once they are a small part."""
        if now.prefill_s >= _COST_HALF_LIFE_S:
            self._learn(now, EngineStats())

    def _learn(self, now: EngineStats, before: EngineStats) -> None:
        # The queue counts whole prompts, for nobody knows yet what of them is cached; so what was cached counts here.
        tokens = now.prompt_tokens - before.prompt_tokens
        if self._counts_hits:
            tokens += now.prefix_hit_tokens - before.prefix_hit_tokens
        self.cost.add(now.prefill_steps - before.prefill_steps, tokens, now.prefill_s - before.prefill_s)

    @property
    def held(self) -> Estimate | None:
        """How long a sequence holds its seat; None: none has finished yet."""
        return self._held.value

    def is_known(self, now_s: float) -> bool:
        """Whether the last reading still says something of the queues."""
        return now_s - self.as_of_s <= MAX_AGE_S

    def drained_tokens(self, now_s: float) -> float:
        """What engines that were never idle have computed since the last reading, by the best estimate."""
        full_s = self._full_s
        return (now_s - self.as_of_s) * self.num_engines * self.tokens_per_step / full_s if full_s else 0.0

    def seat_wait(self, num_open: float, num_new: int) -> Estimate:
        """Until the last of so many new sequences has a seat; nothing while nothing is known of seats.

        Args:
            num_open: sequences that have a seat or wait for one before.
            num_new: they count twice where others wait, for as many may overtake them.
        """
        num_seats = self._num_seats
        num_waiting = max(0.0, num_open - num_seats)
        beyond = num_open + num_new + min(num_new, num_waiting) - num_seats
        if beyond <= 0 or num_seats == 0:
            return NOTHING
        held = self.held
        if held is None:
            return UNKNOWN
        return held.times(beyond / num_seats)


def _seated(engine: EngineStats) -> int:
    return engine.num_reserved + engine.num_running


def _num_seats(engine: EngineStats) -> float:
    """Sequences that an engine can hold at once: as many as it may, or as have KV blocks if all need what these do."""
    if not engine.num_used_blocks:
        return engine.max_num_seqs
    return min(engine.max_num_seqs, _seated(engine) * engine.num_blocks / engine.num_used_blocks)
