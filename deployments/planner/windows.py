"""What is kept of a recent past: a mean, a tail, how long a queue waits. Pure: no clock."""

import math
from bisect import bisect_left
from collections import deque

from deployments.engine.stats import Histogram
from deployments.planner.observation import Tail

_TAIL_HALF_LIFE_S = 30.0
# Of answers that end, after which what was seen counts half where the last few are looked at.
_LAST_ANSWERS = 8.0
# Standard deviations by which fewer end than is explained by chance.
_SURPRISE = 4.0


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

    That answers have become longer shows before these have ended. It is believed where chance does not explain that so
    few end, by those that have ended before and not by what was believed of them. These are of another kind then: the
    mean is that of the last few without them, at least what those that run have drawn so far, and at most twice that,
    for in the midst of answers of one length half of each is drawn.

    Args:
        believed: tokens, before anything is known.
        weight: answers that have to end until that counts half.
        half_life: answers after which what was seen counts half.

    Source: the maximum likelihood of an exponential distribution under censoring: exposure over events.
    """

    def __init__(self, believed: float, weight: float, half_life: float) -> None:
        self._believed, self._weight, self._half_life = believed, weight, half_life
        self._drawn = self._ended = self._last_drawn = self._last_ended = 0.0
        self._age = 0.0  # tokens that those that run have drawn, each
        self._before = Share(half_life)  # the mean a while ago; while no answer ends, it is not past
        self._allowed: float | None = None

    def add(self, drawn: int, ended: int) -> None:
        """So many tokens were drawn, and so many answers ended meanwhile."""
        if drawn < 0 or ended < 0:
            return
        were_longer = self._are_longer
        keep_last = 0.5 ** (ended / _LAST_ANSWERS)
        keep = keep_last if were_longer else 0.5 ** (ended / self._half_life)
        self._weight *= keep
        self._drawn, self._ended = keep * self._drawn + drawn, keep * self._ended + ended
        self._last_drawn = keep_last * self._last_drawn + drawn
        self._last_ended = keep_last * self._last_ended + ended
        if ended:
            self._before.add(ended * self._drawn / self._ended, ended)
        if self._are_longer and not were_longer:  # the last that have ended are of the others
            self._last_drawn -= self._last_ended * self._before.value(0.0)
            self._last_ended = 0.0

    def note_running(self, num_running: int, drawn: int, num_open: int, allowed: int) -> None:
        """So many run and have drawn so many tokens; and so many, with those that wait, may draw so many at most."""
        self._age = drawn / num_running if num_running else 0.0
        if num_open and allowed:
            self._allowed = allowed / num_open

    @property
    def value(self) -> float:
        """Tokens."""
        if not self._are_longer:
            return self._mean
        last = self._last_drawn / max(1.0, self._last_ended)
        return max(self._mean, min(max(last, self._age), 2.0 * self._age))

    @property
    def _are_longer(self) -> bool:
        """Whether fewer of the last answers have ended than of such as were before would have, beyond chance."""
        before = self._before.value(0.0)
        expected = self._last_drawn / before if before else 0.0
        return expected - self._last_ended > _SURPRISE * math.sqrt(expected)

    @property
    def _mean(self) -> float:
        believed = self._believed if self._allowed is None else min(self._believed, self._allowed)
        return (self._drawn + believed * self._weight) / (self._ended + self._weight)


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


class HandedOn:
    """What ingresses held goes on to engines, and has come once. Both tell of it, up to some seconds apart.

    What is not held any more and no engine tells of soon has left.

    Args:
        within_s: engines tell of it within so long.
    """

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._held = 0
        self._gone: deque[tuple[float, float]] = deque()  # when, and how much of it no engine has told of
        self._early = 0.0  # of what is held, that an engine has told of

    def came(self, held: int, at_engines: float, at_s: float) -> float:
        """How much has come since the last time: so much is held now, and so much is new at engines."""
        more, self._held = held - self._held, held
        if more < 0:
            known = min(-more, self._early)
            self._early -= known
            self._gone.append((at_s, -more - known))
        while self._gone and at_s - self._gone[0][0] > self._within_s:
            self._gone.popleft()
        while self._gone and at_engines > 0:
            since_s, left = self._gone.popleft()
            known = min(left, at_engines)
            at_engines -= known
            if left > known:
                self._gone.appendleft((since_s, left - known))
        early = min(at_engines, max(0.0, held - max(0, more) - self._early))
        self._early += early
        return max(0, more) + at_engines - early
