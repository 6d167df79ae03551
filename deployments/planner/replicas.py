"""The replicas of one pool as readings tell of them: which are new or warm, and what each did between two readings.

Pure: no clock.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.engine.stats import EngineStats

# A replica is cold for so long, and until it has done so many steps, or as many seconds of prompts: where a step takes
# seconds, the first one tells most of what there is to know, and nothing is planned until something is known.
_COLD_S, _COLD_STEPS, _COLD_BUSY_S = 10.0, 20, 5.0
# Of what it takes to start, the longest of the last few is planned with.
_NUM_STARTS = 5
# One that has not come after so many times that is not waited for.
_LATE_STARTS = 2.0
# So many that are gone are known if they come back.
_MAX_GONE = 1000
# Replicas tell once a second. What is heard first may be older: who tells a controller that crashes tells it again.
_TOLD_WITHIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """One replica between two readings."""

    now: EngineStats
    before: EngineStats
    is_warm: bool


class Replicas:
    """The replicas of one pool: which are warm, and how long they took to start."""

    def __init__(self, start_s: float) -> None:
        self.stats: dict[str, EngineStats] = {}
        self._since_s: dict[str, float] = {}  # of those that are gone, too: they may come back
        self._heard_s: dict[str, float] = {}  # first, of those that began before and have told nothing new since
        self._begun_s = math.inf  # the first reading
        self._asked: deque[float] = deque()
        self._starts: deque[float] = deque(maxlen=_NUM_STARTS)
        self._unseen_start_s = start_s

    def note_asked(self, num_more: int, at_s: float) -> None:
        self._asked.extend([at_s] * num_more)
        for _ in range(min(-num_more, len(self._asked))):
            self._asked.pop()  # what has not come yet is waited for no longer

    def adopt(self, name: str, others: "Replicas") -> None:
        """A replica of others does this pool's work now: what it did before is known, and it has not just started."""
        self.stats[name], self._since_s[name] = others.stats.pop(name), others._since_s.pop(name)

    def take(self, engines: Mapping[str, EngineStats], as_of_s: float, at_s: float) -> list[Progress]:
        """A reading.

        All that a replica has done came since the one before only if it began after the first one, and is not known.
        Of others, as where Serve's controller has restarted or not heard of one for a while, what they say first counts
        as past, and if that was old when it was heard, what they say next as well.
        """
        is_first, self._begun_s = at_s < self._begun_s, min(self._begun_s, at_s)
        before = {name: self.stats.get(name, now) for name, now in engines.items()}
        for name in engines.keys() - self._since_s.keys():
            is_newborn = not is_first and as_of_s - engines[name].uptime_s >= self._begun_s
            self._since_s[name] = at_s if is_newborn else -math.inf
            if not is_newborn:
                self._heard_s[name] = at_s
            else:
                before[name] = EngineStats()
                if self._asked:
                    self._starts.append(at_s - self._asked.popleft())
        for name in [name for name in self._since_s if name not in engines][:-_MAX_GONE]:
            del self._since_s[name]
            self._heard_s.pop(name, None)
        for name in [name for name in self._heard_s if name in engines and engines[name] != before[name]]:
            told_after_s = engines[name].uptime_s - before[name].uptime_s
            if told_after_s > at_s - self._heard_s.pop(name) + _TOLD_WITHIN_S:
                before[name] = engines[name]  # most of it came before the planner began
        self.stats = dict(engines)
        return [Progress(now, before[name], self.is_warm(name, at_s)) for name, now in engines.items()]

    def is_warm(self, name: str, at_s: float) -> bool:
        stats = self.stats[name]
        has_run = stats.steps >= _COLD_STEPS or stats.prefill_s >= _COLD_BUSY_S
        return has_run and at_s - self._since_s[name] >= _COLD_S

    def are_starting(self, at_s: float) -> bool:
        """Whether some were asked for and should soon be there; not those that get no node, or fail."""
        return bool(self._asked) and at_s - self._asked[0] <= _LATE_STARTS * self.start_s

    @property
    def start_s(self) -> float:
        """That one takes to start."""
        return max(self._starts) if self._starts else self._unseen_start_s
