"""What is kept of a recent past: a mean, a tail, how long a queue waits. Pure: no clock."""

import math
from bisect import bisect_left
from collections import deque

from deployments.engine.stats import Histogram
from deployments.planner.observation import Tail

_TAIL_HALF_LIFE_S = 30.0


class Share:
    """A mean of the recent past, by what it is counted over."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self.total = self.count = 0.0

    def add(self, total: float, count: float) -> None:
        if count > 0 and total >= 0:
            keep = 0.5 ** (count / self._half_life)
            self.total, self.count = keep * self.total + total, keep * self.count + count

    def value(self, otherwise: float) -> float:
        return self.total / self.count if self.count else otherwise


class MeanLength:
    """Of answers, from what is drawn and how many end, as if each token was the last one by the same chance.

    So answers that have not ended count as well, for what they have drawn. Of those that ended alone the mean would be
    too small when traffic begins or grows: the short ones end first.

    Args:
        believed: tokens, before anything is known.
        weight: answers that have to end until that counts half.
        half_life: answers after which what was seen counts half.

    Source: the maximum likelihood of an exponential distribution under censoring: exposure over events.
    """

    def __init__(self, believed: float, weight: float, half_life: float) -> None:
        self._prior = believed * weight, weight
        self._half_life = half_life
        self._drawn = self._ended = 0.0

    def add(self, drawn: int, ended: int) -> None:
        """So many tokens were drawn, and so many answers ended meanwhile."""
        if drawn >= 0 and ended >= 0:
            keep = 0.5 ** (ended / self._half_life)
            self._drawn, self._ended = keep * self._drawn + drawn, keep * self._ended + ended

    @property
    def value(self) -> float:
        """Tokens."""
        return (self._drawn + self._prior[0]) / (self._ended + self._prior[1])


class TailWindow:
    """Of a histogram that grows: how many lately exceeded a bound."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._count = self._over = 0.0

    def pass_time(self, seconds: float) -> None:
        keep = 0.5 ** (seconds / _TAIL_HALF_LIFE_S)
        self._count *= keep
        self._over *= keep

    def add(self, now: Histogram, before: Histogram) -> None:
        counts = [new - old for new, old in zip(now.counts, before.counts, strict=True)]
        if min(counts) < 0:
            return
        self._count += sum(counts)
        self._over += _above(now.bounds, counts, self._bound_s)

    @property
    def value(self) -> Tail:
        return Tail(self._count, self._over / self._count) if self._count else Tail()


def _above(bounds: tuple[float, ...], counts: list[int], bound_s: float) -> float:
    """How many were above a bound; those in its bucket are taken to lie evenly."""
    at = bisect_left(bounds, bound_s)
    over = float(sum(counts[at + 1 :]))
    if at < len(bounds):
        low = bounds[at - 1] if at else 0.0
        over += counts[at] * (bounds[at] - bound_s) / (bounds[at] - low)
    return over


class QueueAge:
    """How long the first of a queue waits: since as much had come as has left by now."""

    def __init__(self) -> None:
        self._came: deque[tuple[float, float]] = deque([(0.0, -math.inf)])  # in all, and by when

    def age(self, came: float, left: float, at_s: float) -> float:
        """Args: what has come in all, what of it has left, the time."""
        if came > self._came[-1][0]:
            self._came.append((came, at_s))
        while len(self._came) > 1 and self._came[1][0] <= left:
            self._came.popleft()
        return at_s - self._came[1][1] if len(self._came) > 1 and came > left else 0.0
