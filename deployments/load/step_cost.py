"""What a step of an engine costs: so many seconds for itself, and so many for each of its tokens.

Owns the model, how it is learned while the engine works, and how far it can be trusted. Knows nothing of engines,
queues or requests; whoever asks what a queue or a prompt will take brings its numbers of steps and tokens. Pure: no
clock.
"""

import math
from dataclasses import dataclass

# Standard deviations between the best estimate and its ends.
_NUM_SIGMAS = 2.0
# What is taken to be known of the noise before anything is: a busy second is off by a third, and that is believed as
# firmly as two measurements. Less than half a busy second of evidence therefore excludes nothing.
_PRIOR_VARIANCE_S = 0.1
_PRIOR_WEIGHT = 2.0
_NUM_PARAMETERS = 2
# A measurement is weighted by what the model expects of it, but not before the model can expect something: it is taken
# to be off by at most this factor.
_MAX_SURPRISE = 3.0
# 1 - r^2 of steps and tokens below which they have always been in one proportion, and cannot be told apart.
_COLLINEAR = 1e-6


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that something will take.

    Attributes:
        low: the optimistic end: less would contradict what was measured.
        best: what fits it best; 0 if nothing was measured.
        high: the pessimistic end; infinite if what was measured sets no bound.
    """

    low: float
    best: float
    high: float

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.low + other.low, self.best + other.best, self.high + other.high)

    def times(self, factor: float) -> "Estimate":
        """So many times, more than 0."""
        return Estimate(self.low * factor, self.best * factor, self.high * factor)

    def or_longer(self, other: "Estimate") -> "Estimate":
        """Both have to pass, at once."""
        return Estimate(max(self.low, other.low), max(self.best, other.best), max(self.high, other.high))


NOTHING = Estimate(0.0, 0.0, 0.0)
UNKNOWN = Estimate(0.0, 0.0, math.inf)


class StepCost:
    """Learns `seconds = per_step * steps + per_token * tokens` from sums over some steps, one after the other.

    Neither cost is negative. Steps alike in size tell only their sum: then every split of it fits, `seconds` of such
    steps is known well, and that of others lies between the splits.

    Args:
        half_life_s: busy seconds after which a measurement counts half. One that is longer than that counts as so long.

    Source: least squares with exponential forgetting, the variance of a measurement being proportional to its
    expected seconds, so that it makes no difference how often the counters are read. The ends of an estimate are those
    over all costs whose squared error exceeds the least one by no more than `_NUM_SIGMAS` allows.
    """

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        # Weighted sums of products: steps and tokens (n, t) with each other and with the seconds (s).
        self._nn = self._nt = self._tt = self._ns = self._ts = self._ss = 0.0
        self._count = 0.0
        self._evidence_s = 0.0

    @property
    def evidence_s(self) -> float:
        """Measured seconds that still count."""
        return self._evidence_s

    def add(self, steps: float, tokens: float, seconds: float) -> None:
        """Take a measurement: so many steps with so many tokens in all took so long. Without any of them: nothing."""
        if not (steps > 0 and tokens > 0 and 0 < seconds < math.inf):
            return
        expected_s = self.seconds(steps, tokens).best or seconds
        expected_s = min(max(expected_s, seconds / _MAX_SURPRISE), seconds * _MAX_SURPRISE)
        share = min(1.0, self._half_life_s / seconds)
        keep = 0.5 ** (share * seconds / self._half_life_s)
        weight = share / expected_s
        self._nn = keep * self._nn + weight * steps * steps
        self._nt = keep * self._nt + weight * steps * tokens
        self._tt = keep * self._tt + weight * tokens * tokens
        self._ns = keep * self._ns + weight * steps * seconds
        self._ts = keep * self._ts + weight * tokens * seconds
        self._ss = keep * self._ss + weight * seconds * seconds
        self._count = keep * self._count + 1.0
        self._evidence_s = keep * self._evidence_s + share * seconds

    def seconds(self, steps: float, tokens: float) -> Estimate:
        """What so many steps with so many tokens in all will take.

        Args:
            steps: also a part of one.
            tokens: likewise.
        """
        if steps <= 0 and tokens <= 0:
            return NOTHING
        if not self._evidence_s:
            return UNKNOWN
        fit = _Fit(
            self._nt / math.sqrt(self._nn * self._tt),
            self._ns / math.sqrt(self._nn),
            self._ts / math.sqrt(self._tt),
            self._ss,
        )
        variance_s = (_PRIOR_WEIGHT * _PRIOR_VARIANCE_S + fit.least) / (
            _PRIOR_WEIGHT + max(0.0, self._count - _NUM_PARAMETERS)
        )
        return fit.extremes(
            steps / math.sqrt(self._nn), tokens / math.sqrt(self._tt), _NUM_SIGMAS * _NUM_SIGMAS * variance_s
        )


@dataclass(frozen=True, slots=True)
class _Fit:
    """The squared error `ss - 2 (x gx + y gy) + x^2 + 2 r x y + y^2` of costs x, y >= 0, in units that make it so."""

    r: float
    gx: float
    gy: float
    ss: float

    @property
    def _det(self) -> float:
        return 1.0 - self.r * self.r

    @property
    def _centre(self) -> tuple[float, float] | None:
        """Where it is least if costs could be negative; None: along a line."""
        if self._det < _COLLINEAR:
            return None
        return (self.gx - self.r * self.gy) / self._det, (self.gy - self.r * self.gx) / self._det

    @property
    def best(self) -> tuple[float, float]:
        """Where it is least. Of a whole line that fits equally well, the end at which all is for tokens."""
        centre = self._centre
        if centre is not None and min(centre) >= 0:
            return centre
        # Both are positive, being sums of positive products; so one of the edges has the least.
        return (self.gx, 0.0) if self.gx > self.gy * (1 + _COLLINEAR) else (0.0, self.gy)

    @property
    def least(self) -> float:
        """The error there; rounding must not make it negative."""
        x, y = self.best
        return max(0.0, self._error(x, y))

    def extremes(self, cx: float, cy: float, slack: float) -> Estimate:
        """Least, best and greatest `cx x + cy y` among the costs whose error is at most `least + slack`.

        They form an ellipse, cut off where a cost would be negative. A linear function has its extremes where it has
        those of the whole ellipse, or else on the cuts.
        """
        x, y = self.best
        best = cx * x + cy * y
        bound = self.least + slack
        on_cuts = [cy * y for y in _edge(self.gy, self.ss - bound)] + [cx * x for x in _edge(self.gx, self.ss - bound)]
        low, high = min([best, *on_cuts]), max([best, *on_cuts])
        if (centre := self._centre) is not None:
            dx, dy = (cx - self.r * cy) / self._det, (cy - self.r * cx) / self._det
            length = math.sqrt(max(cx * dx + cy * dy, 0.0))
            reach = math.sqrt(max(0.0, bound - self._error(*centre)))
            if length > 0:
                step = reach / length
                if centre[0] >= step * dx and centre[1] >= step * dy:
                    low = min(low, cx * centre[0] + cy * centre[1] - reach * length)
                if centre[0] >= -step * dx and centre[1] >= -step * dy:
                    high = max(high, cx * centre[0] + cy * centre[1] + reach * length)
        return Estimate(max(0.0, low), best, high)

    def _error(self, x: float, y: float) -> float:
        return self.ss - 2 * (x * self.gx + y * self.gy) + x * x + 2 * self.r * x * y + y * y


def _edge(g: float, excess: float) -> tuple[float, ...]:
    """Where `z^2 - 2 g z + excess <= 0` for z >= 0 begins and ends; g is not negative."""
    square = g * g - excess
    if square < 0:
        return ()
    root = math.sqrt(square)
    return max(0.0, g - root), g + root
