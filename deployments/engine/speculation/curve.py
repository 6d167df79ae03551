"""What a step of so many tokens takes, learned from steps that were run anyway. Pure: no clock."""

from collections.abc import Sequence
from math import inf

import numpy as np

# Steps after which a size that was not run again is forgotten: contexts have grown since, or others use the machine.
_MEMORY_STEPS = 2048
# Steps of a size before it is judged. The first one may wait for code or memory, as that of a CUDA graph does: a size
# that looks slow by it is not run again, and those above it are taken to be as slow.
_FEW_STEPS = 3
# Weight of a new measurement; the first ones of a size weigh more.
_LEAST_WEIGHT = 0.1
# One step that was held up says little: it counts as at most so many times what was expected.
_MAX_SURPRISE = 1.5
# Whoever takes the size that looks cheapest takes one whose estimate is too low more often than not. By how much they
# were is learned with this weight from steps with drafts, and forgotten by this share with each step without.
_BIAS_WEIGHT, _BIAS_LOSS = 0.1, 0.005


class StepCurve:
    """Seconds of a step by its tokens.

    Sizes that were hardly run are taken to cost as little as is possible, where steps are padded; else to lie on the
    lines through those that were: a CPU does each token by itself.

    Args:
        max_tokens: no step has more.
        drafted_sizes: to which steps with drafts are padded, in order: those between two cost the same. Of a runner
            that pads none there are none.
    """

    def __init__(self, max_tokens: float = inf, drafted_sizes: Sequence[int] = ()) -> None:
        self._max_tokens = max_tokens
        self._drafted_sizes = np.array(drafted_sizes, dtype=np.int64)
        self._num_steps = 0
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._bias = 1.0

    def add(self, num_tokens: int, seconds: float, *, has_drafts: bool = False) -> None:
        """A step has ended."""
        self._num_steps += 1
        size = int(self._drafted(np.array([num_tokens]))[0]) if has_drafts else _size(num_tokens)
        self._learn_bias(size, seconds, has_drafts)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        self._seconds[size] = self._joined(self._seconds.get(size, inf), seconds, count)
        self._last[size] = self._num_steps
        if self._num_steps % _MEMORY_STEPS == 0:
            self._forget()

    def is_known(self, num_tokens: int) -> bool:
        """Whether enough of such steps without drafts were run lately to compare others with them."""
        return self._counts.get(_size(num_tokens), 0) >= _FEW_STEPS

    def seconds(self, num_tokens: int) -> float:
        """Of a step without drafts, at least. 0: nothing is known."""
        size = _size(num_tokens)
        return self._seconds[size] if size in self._seconds else self._estimate(size)

    def drafted_seconds(self, num_tokens: np.ndarray) -> np.ndarray:
        """(N,) of steps of so many tokens, (N,), with drafts; at least. 0: nothing is known.

        Where steps are padded, no less than of a smaller one, nor more than of a larger one.
        """
        sizes, which = np.unique(self._drafted(num_tokens), return_inverse=True)
        seconds = self._on_lines(sizes) if len(self._drafted_sizes) == 0 else None
        if seconds is None:
            seconds = np.array([self._estimate(int(size)) for size in sizes])
        return np.where(num_tokens <= self._max_tokens, self._bias * seconds[which], inf)

    def _learn_bias(self, size: int, seconds: float, has_drafts: bool) -> None:
        """Before it is known what a step of this size took."""
        if not has_drafts:
            self._bias -= _BIAS_LOSS * (self._bias - 1.0)
        elif self._counts.get(size, 0) >= _FEW_STEPS:
            surprise = min(seconds / self._seconds[size], _MAX_SURPRISE)
            self._bias = max(1.0, self._bias + _BIAS_WEIGHT * (surprise - self._bias))

    def _on_lines(self, sizes: np.ndarray) -> np.ndarray | None:
        """(N,) of steps of such sizes, from one to the next of those that are known; None: fewer than two are."""
        known = sorted(size for size, count in self._counts.items() if count >= _FEW_STEPS)
        if len(known) < 2:
            return None
        seconds = [self._seconds[size] for size in known]
        slope = max(0.0, (seconds[-1] - seconds[0]) / (known[-1] - known[0]))
        on_lines: np.ndarray = np.interp(sizes, known, seconds) + slope * np.maximum(0, sizes - known[-1])
        return on_lines

    def _joined(self, known: float, seconds: float, count: int) -> float:
        """With one more measurement: of the first ones the least, then a mean that follows them."""
        if count <= _FEW_STEPS:
            return min(known, seconds)
        weight = max(_LEAST_WEIGHT, 1.0 / (count - _FEW_STEPS + 1))
        return known + weight * (min(seconds, known * _MAX_SURPRISE) - known)

    def _estimate(self, size: int) -> float:
        if self._counts.get(size, 0) >= _FEW_STEPS:
            return self._seconds[size]
        smaller = [self._seconds[n] for n, count in self._counts.items() if n < size and count >= _FEW_STEPS]
        others = [seconds for other, seconds in self._seconds.items() if other >= size]
        if not smaller:
            smaller = [seconds for other, seconds in self._seconds.items() if other < size]
            smaller = [min(smaller)] if smaller else []
        return min([max(smaller, default=0.0), *others])

    def _drafted(self, num_tokens: np.ndarray) -> np.ndarray:
        """(N,) of classes of steps with drafts."""
        shifts = np.maximum(0, np.frexp(num_tokens)[1] - 4)
        sizes: np.ndarray = num_tokens >> shifts << shifts
        places = np.searchsorted(self._drafted_sizes, num_tokens)
        is_padded = places < len(self._drafted_sizes)
        sizes[is_padded] = self._drafted_sizes[places[is_padded]]
        return sizes

    def _forget(self) -> None:
        for size in [size for size, last in self._last.items() if self._num_steps - last >= _MEMORY_STEPS]:
            del self._seconds[size], self._counts[size], self._last[size]


def _size(num_tokens: int) -> int:
    """Of a class of steps that are not padded: each number up to 16 for itself, then eight to an octave."""
    shift = max(0, num_tokens.bit_length() - 4)
    return num_tokens >> shift << shift
