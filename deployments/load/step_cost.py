"""What a step of an engine costs: so many seconds for itself, and so many for each of its tokens.

Owns the model, how it is learned while the engine works, and how far it can be trusted. Knows nothing of engines,
queues or requests; whoever asks what a queue or a prompt will take brings its numbers of steps and tokens. Pure: no
clock.
"""

import math

import msgspec

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


# A struct, not a dataclass: each call that comes is estimated several times (0.2 us against 1.2 us).
class Estimate(msgspec.Struct, frozen=True, gc=False):
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
        # What follows from these sums: it is asked for several times per request, and they change once a second.
        self._fit: _Fit | None = None
        self._unit_steps = self._unit_tokens = 1.0  # of the fit

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
        self._fit = None

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
        if self._fit is None:
            self._fit = self._solve()
        return self._fit.extremes(steps / self._unit_steps, tokens / self._unit_tokens)

    def _solve(self) -> "_Fit":
        nn, tt = self._unit_steps, self._unit_tokens = math.sqrt(self._nn), math.sqrt(self._tt)
        certainty = _PRIOR_WEIGHT + max(0.0, self._count - _NUM_PARAMETERS)
        return _Fit(self._nt / (nn * tt), self._ns / nn, self._ts / tt, self._ss, certainty)


class _Fit:
    """The squared error `ss - 2 (x gx + y gy) + x^2 + 2 r x y + y^2` of costs x, y >= 0, in units that make it so.

    Costs are possible whose error exceeds the least by no more than `_NUM_SIGMAS` allow.

    Args:
        r: see above, likewise the next three.
        gx: of x.
        gy: of y.
        ss: without either.
        certainty: measurements that the noise is known by.
    """

    def __init__(self, r: float, gx: float, gy: float, ss: float, certainty: float) -> None:
        self.r, self.gx, self.gy, self.ss = r, gx, gy, ss
        self.det = 1.0 - r * r
        # Where it is least if costs could be negative; None: along a line.
        self.centre = ((gx - r * gy) / self.det, (gy - r * gx) / self.det) if self.det >= _COLLINEAR else None
        self.best = self._find_best()
        least = max(0.0, self._error(*self.best))  # rounding must not make it negative
        slack = _NUM_SIGMAS * _NUM_SIGMAS * (_PRIOR_WEIGHT * _PRIOR_VARIANCE_S + least) / certainty
        # Where the possible costs begin and end that have one of the two at 0, and how far they reach from the centre.
        self.edge_x, self.edge_y = _edge(gx, ss - least - slack), _edge(gy, ss - least - slack)
        self.reach = 0.0
        if self.centre is not None:
            self.reach = math.sqrt(max(0.0, least + slack - self._error(*self.centre)))

    def _find_best(self) -> tuple[float, float]:
        """Where it is least. Of a whole line that fits equally well, the end at which all is for tokens."""
        if self.centre is not None and min(self.centre) >= 0:
            return self.centre
        # Both are positive, being sums of positive products; so one of the edges has the least.
        return (self.gx, 0.0) if self.gx > self.gy * (1 + _COLLINEAR) else (0.0, self.gy)

    def extremes(self, cx: float, cy: float) -> Estimate:
        """Least, best and greatest `cx x + cy y` among the possible costs.

        They form an ellipse, cut off where a cost would be negative. A linear function has its extremes where it has
        those of the whole ellipse, or else on the cuts.
        """
        x, y = self.best
        low = best = high = cx * x + cy * y
        for c, edges in ((cy, self.edge_y), (cx, self.edge_x)):
            for edge in edges:
                on_cut = c * edge
                if on_cut < low:
                    low = on_cut
                elif on_cut > high:
                    high = on_cut
        if (centre := self.centre) is not None:
            dx, dy = (cx - self.r * cy) / self.det, (cy - self.r * cx) / self.det
            length = math.sqrt(max(cx * dx + cy * dy, 0.0))
            if length > 0:
                step, middle = self.reach / length, cx * centre[0] + cy * centre[1]
                if centre[0] >= step * dx and centre[1] >= step * dy:
                    low = min(low, middle - self.reach * length)
                if centre[0] >= -step * dx and centre[1] >= -step * dy:
                    high = max(high, middle + self.reach * length)
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
