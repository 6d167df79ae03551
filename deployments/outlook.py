"""What the pools' own numbers say about the wait of a prompt that comes now.

Owns the readings of one pool and the speeds that are learned from them, one reading after the other. Knows nothing of
who may come in: `admission.py` decides that with it. Pure: no Ray, and no clock of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.engine.stats import EngineStats

# Busy seconds and finished sequences after which an observation counts half: fast enough to follow a change of traffic,
# slow enough that one long prompt is not taken for one.
_SPEED_HALF_LIFE_S = 10.0
_HELD_HALF_LIFE = 16.0
# A request that was let in this long before a reading began may not have reached an engine yet.
_ON_THE_WAY_S = 0.25
# Older readings say nothing of the queues; speeds are still those last seen.
MAX_AGE_S = 10.0

_NOTHING = EngineStats()


class RecentRatio:
    """Quotient of what two counters have grown by; what lies `half_life` of the lower one's growth back counts half.

    It keeps its value while neither grows, so that an idle engine does not forget its speed.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._above = self._below = 0.0

    @property
    def value(self) -> float | None:
        """None: nothing was measured yet."""
        return self._above / self._below if self._above > 0 and self._below > 0 else None

    def add(self, above: float, below: float) -> None:
        keep = 0.5 ** (below / self._half_life)
        self._above = keep * self._above + above
        self._below = keep * self._below + below


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a prompt meets that comes to a pool now.

    Attributes:
        queued_tokens: of prompts before it.
        num_engines: that compute prompts of this pool.
        speed: prompt tokens per second of one of them; None: not measured yet.
        seat_wait_s: until there is a seat in a decode engine.
    """

    queued_tokens: float
    num_engines: int
    speed: float | None
    seat_wait_s: float

    @property
    def rate(self) -> float | None:
        """Prompt tokens per second of all engines."""
        return None if self.speed is None else self.speed * self.num_engines

    @property
    def wait_s(self) -> float:
        """Until the prompt's turn comes: both queues are passed at once, so that the slower one decides."""
        return max(self.queued_tokens / self.rate if self.rate else 0.0, self.seat_wait_s)


class PoolReadings:
    """The engines of one pool as they were last seen.

    Args:
        counts_hits: cached prompt tokens count as computed. Not where other engines compute what is not cached.
    """

    def __init__(self, counts_hits: bool) -> None:
        self._counts_hits = counts_hits
        self._engines: dict[str, EngineStats] = {}
        self.taken_s = -math.inf
        self._speed = RecentRatio(_SPEED_HALF_LIFE_S)
        self._held = RecentRatio(_HELD_HALF_LIFE)

    def update(self, engines: Mapping[str, EngineStats], taken_s: float) -> None:
        """Take a reading.

        Args:
            engines: of every replica, by its name.
            taken_s: when the reading began.
        """
        elapsed_s = taken_s - self.taken_s if self._engines else 0.0
        for name, now in engines.items():
            before = self._engines.get(name, _NOTHING)
            self._speed.add(self._done(now) - self._done(before), now.prefill_s - before.prefill_s)
            if name in self._engines:
                self._held.add(_seated(now) * elapsed_s, now.finished - before.finished)
        self._engines = dict(engines)
        self.taken_s = taken_s

    def _done(self, engine: EngineStats) -> int:
        # The queue counts whole prompts, for nobody knows yet what of them is cached; so what was cached counts here.
        return engine.prompt_tokens + (engine.prefix_hit_tokens if self._counts_hits else 0)

    @property
    def num_engines(self) -> int:
        """At least 1: a pool has an engine, whether it was seen or not."""
        return max(1, len(self._engines))

    @property
    def num_ingresses(self) -> int:
        """Ingress replicas that send requests; at least the one that asks."""
        return max([1, *(engine.num_receivers for engine in self._engines.values())])

    @property
    def speed(self) -> float | None:
        """Prompt tokens per second of one engine, in steps that had any."""
        return self._speed.value

    @property
    def own_tokens(self) -> int:
        """Prompt tokens queued for engines of this pool."""
        return sum(e.num_queued_prompt_tokens - e.num_remote_prompt_tokens for e in self._engines.values())

    @property
    def remote_tokens(self) -> int:
        """Prompt tokens queued here for engines of another pool."""
        return sum(e.num_remote_prompt_tokens for e in self._engines.values())

    @property
    def num_sequences(self) -> int:
        return sum(e.num_waiting + _seated(e) for e in self._engines.values())

    def is_known(self, now_s: float) -> bool:
        """Whether the last reading still says something of the queues."""
        return now_s - self.taken_s <= MAX_AGE_S

    def has_seen(self, admitted_s: float) -> bool:
        """Whether the last reading contains a request that was let in then."""
        return admitted_s <= self.taken_s - _ON_THE_WAY_S

    def drained_tokens(self, now_s: float) -> float:
        """What engines that were never idle have computed since the last reading."""
        return (now_s - self.taken_s) * (self.speed or 0.0) * self.num_engines

    def seat_wait_s(self, num_sequences: float) -> float:
        """Until the last of that many sequences has a seat; 0 while nothing is known of seats."""
        num_seats = sum(map(_num_seats, self._engines.values()))
        if self._held.value is None or num_seats == 0:
            return 0.0
        return max(0.0, num_sequences - num_seats) * self._held.value / num_seats


def _seated(engine: EngineStats) -> int:
    return engine.num_reserved + engine.num_running


def _num_seats(engine: EngineStats) -> float:
    """Sequences that an engine can hold at once: as many as it may, or as have KV blocks if all need what these do."""
    if not engine.num_used_blocks:
        return engine.max_num_seqs
    return min(engine.max_num_seqs, _seated(engine) * engine.num_blocks / engine.num_used_blocks)
