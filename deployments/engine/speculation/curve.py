"""What a step of so many tokens takes, learned from steps that were run anyway. Pure: no clock."""

from math import inf

# Steps after which a size that was not run again is forgotten: contexts have grown since, or others use the machine.
_MEMORY_STEPS = 512
# Weight of a new measurement; the first ones of a size weigh more.
_LEAST_WEIGHT = 0.1
# One step that was held up says little: it counts as at most so many times what was expected.
_MAX_SURPRISE = 1.5


class StepCurve:
    """Seconds of a step by its tokens. Sizes that were not run are taken to cost as little as is possible.

    Args:
        max_tokens: no step has more.
    """

    def __init__(self, max_tokens: float = inf) -> None:
        self._max_tokens = max_tokens
        self._num_steps = 0
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._estimates: dict[int, float] = {}  # asked hundreds of times between two steps

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step has ended."""
        self._num_steps += 1
        self._estimates.clear()
        size = _size(num_tokens)
        if (known := self._seconds.get(size)) is None:
            self._seconds[size], self._counts[size] = seconds, 1
        else:
            self._counts[size] += 1
            weight = max(_LEAST_WEIGHT, 1.0 / self._counts[size])
            self._seconds[size] = known + weight * (min(seconds, known * _MAX_SURPRISE) - known)
        self._last[size] = self._num_steps
        if self._num_steps % _MEMORY_STEPS == 0:
            self._forget()

    def is_known(self, num_tokens: int) -> bool:
        """Whether such steps were run lately."""
        return _size(num_tokens) in self._seconds

    def seconds(self, num_tokens: int) -> float:
        """Of a step, at least: no less than a smaller one, nor more than a larger one. 0: nothing is known."""
        if num_tokens > self._max_tokens:
            return inf
        size = _size(num_tokens)
        if (known := self._estimates.get(size)) is None:
            known = self._estimates[size] = self._estimate(size)
        return known

    def _estimate(self, size: int) -> float:
        if (known := self._seconds.get(size)) is not None:
            return known
        smaller = [seconds for other, seconds in self._seconds.items() if other < size]
        larger = [seconds for other, seconds in self._seconds.items() if other > size]
        return min([max(smaller, default=0.0), *larger])

    def _forget(self) -> None:
        for size in [size for size, last in self._last.items() if self._num_steps - last >= _MEMORY_STEPS]:
            del self._seconds[size], self._counts[size], self._last[size]


def _size(num_tokens: int) -> int:
    """Of a class of steps: each number up to 16 for itself, then eight to an octave."""
    shift = max(0, num_tokens.bit_length() - 4)
    return num_tokens >> shift << shift
