"""How much of something arrives per second: lately, over a while, and how unevenly. Pure: no clock."""

import math
from dataclasses import dataclass

# Seconds after which what arrived counts less by e. The quick one follows a burst, the slow one is what is planned for.
_FAST_S, _SLOW_S = 10.0, 90.0
# The same of the rate to which it is compared where less comes than before.
_FALL_S = 30.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Of something that arrives.

    Attributes:
        slow: per second, over a while.
        fast: per second, lately.
        variance: of what arrives in a second, as it adds up over seconds; for single arrivals at random it is `slow`.
        slow_error: standard deviation of `slow`.
        fast_error: of `fast`.
    """

    slow: float = 0.0
    fast: float = 0.0
    variance: float = 0.0
    slow_error: float = 0.0
    fast_error: float = 0.0

    def times(self, factor: float) -> "Rate":
        """In another unit."""
        return Rate(
            self.slow * factor,
            self.fast * factor,
            self.variance * factor * factor,
            self.slow_error * factor,
            self.fast_error * factor,
        )

    @property
    def now(self) -> float:
        """The slow rate, or the fast one where chance does not explain that it is higher."""
        return self.fast if self.fast > self.slow + 4.0 * self.fast_error else self.slow


class _Average:
    """An exponentially weighted mean per second; over what there was, while there was less than its span."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._total = self.seconds = 0.0

    def add(self, total: float, seconds: float) -> None:
        keep = math.exp(-seconds / self._span_s)
        self._total = keep * self._total + total
        self.seconds = keep * self.seconds + seconds

    @property
    def value(self) -> float:
        return self._total / self.seconds if self.seconds else 0.0


class Flow:
    """Learns a `Rate` from what arrived between readings.

    Args:
        block_s: unevenness is told between stretches of so long; shorter ones even out in a queue.
    """

    def __init__(self, block_s: float) -> None:
        self._block_s = block_s
        self._fast, self._slow, self._falling = _Average(_FAST_S), _Average(_SLOW_S), _Average(_FALL_S)
        # Of blocks: squared distances from the rate, and what arrived. Their ratio is kept for longer than rates are,
        # for it belongs to what arrives, and not to how much does.
        self._spread, self._spread_of = _Average(2 * _SLOW_S), _Average(2 * _SLOW_S)
        self._block = [0.0, 0.0]

    def add(self, amount: float, seconds: float) -> None:
        """So much arrived in so long."""
        if seconds <= 0:
            return
        for average in (self._fast, self._slow, self._falling):
            average.add(amount, seconds)
        self._block[0] += amount
        self._block[1] += seconds
        if self._block[1] >= self._block_s:
            total, length_s = self._block
            # That less comes than a while ago is no unevenness: the slow rate is late.
            rate = min(self._slow.value, self._falling.value)
            self._spread.add((total - rate * length_s) ** 2, length_s)
            self._spread_of.add(total, length_s)
            self._block = [0.0, 0.0]

    @property
    def rate(self) -> Rate:
        """As of the last reading."""
        fast, slow = self._fast, self._slow
        of = self._spread_of.value
        variance = slow.value * self._spread.value / of if of > 0 else 0.0
        if not slow.seconds:
            return Rate()
        # Weights that fall by e have half as many seconds' worth of independent samples again.
        slow_error = math.sqrt(variance / (2 * slow.seconds))
        return Rate(slow.value, fast.value, variance, slow_error, math.sqrt(variance / (2 * fast.seconds)))
