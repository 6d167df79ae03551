"""What a step of so many tokens takes, learned from steps that were run anyway. Pure: no clock."""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

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
_MORE = np.iinfo(np.int64).max  # tokens than any step has


class _Table(NamedTuple):
    """Of K classes of steps that were run, in order, and one more that stands for all larger ones.

    Attributes:
        known: (K + 1,) their tokens.
        seconds: (K + 1,) of each.
        is_judged: (K + 1,) whether enough of them were run.
        between: (K + 1,) what a step of more tokens than the class before takes, if its own is not judged.
    """

    known: np.ndarray
    seconds: np.ndarray
    is_judged: np.ndarray
    between: np.ndarray


class StepCurve:
    """Seconds of a step by its tokens. Sizes that were hardly run are taken to cost as little as is possible.

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
        self._table = _table_of({}, {})

    def add(self, num_tokens: int, seconds: float, *, has_drafts: bool = False) -> None:
        """A step has ended."""
        self._num_steps += 1
        size = int(self._drafted(np.array([num_tokens]))[0]) if has_drafts else _size(num_tokens)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        self._seconds[size] = self._joined(self._seconds.get(size, inf), seconds, count)
        self._last[size] = self._num_steps
        if self._num_steps % _MEMORY_STEPS == 0:
            self._forget()
        self._table = _table_of(self._seconds, self._counts)

    def is_known(self, num_tokens: int) -> bool:
        """Whether enough of such steps without drafts were run lately to compare others with them."""
        return self._counts.get(_size(num_tokens), 0) >= _FEW_STEPS

    def seconds(self, num_tokens: int) -> float:
        """Of a step without drafts, at least. 0: nothing is known."""
        size = _size(num_tokens)
        return self._seconds[size] if size in self._seconds else float(self._estimates(np.array([size]))[0])

    def drafted_seconds(self, num_tokens: np.ndarray) -> np.ndarray:
        """(N,) of steps of so many tokens, (N,), with drafts; at least.

        No less than of a smaller one, nor more than of a larger one. 0: nothing is known.
        """
        seconds = self._estimates(self._drafted(num_tokens))
        return np.where(num_tokens <= self._max_tokens, seconds, inf)

    def _joined(self, known: float, seconds: float, count: int) -> float:
        """With one more measurement: of the first ones the least, then a mean that follows them."""
        if count <= _FEW_STEPS:
            return min(known, seconds)
        weight = max(_LEAST_WEIGHT, 1.0 / (count - _FEW_STEPS + 1))
        return known + weight * (min(seconds, known * _MAX_SURPRISE) - known)

    def _estimates(self, sizes: np.ndarray) -> np.ndarray:
        """(N,) of classes of steps; those that few were run of lie between smaller and larger ones."""
        known, seconds, is_judged, between = self._table
        places = np.searchsorted(known, sizes)
        is_known = is_judged[places] & (known[places] == sizes)
        return np.where(is_known, seconds[places], between[places])

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


def _table_of(seconds_of: dict[int, float], counts: dict[int, int]) -> _Table:
    """What the estimates are read from, made when a step has ended: they are asked for while a GPU waits."""
    sizes = sorted(seconds_of)
    seconds = np.array([seconds_of[size] for size in sizes], dtype=np.float64)
    is_judged = np.array([counts[size] >= _FEW_STEPS for size in sizes], dtype=bool)
    # Where no smaller class is judged the least of those that were run says something.
    smaller = np.maximum.accumulate(np.where(is_judged, seconds, 0.0))
    smaller = np.where(smaller > 0, smaller, np.minimum.accumulate(seconds))
    larger = np.minimum.accumulate(seconds[::-1])[::-1]
    between = np.minimum(np.append(0.0, smaller), np.append(larger, inf))
    return _Table(np.array([*sizes, _MORE]), np.append(seconds, 0.0), np.append(is_judged, False), between)


def _size(num_tokens: int) -> int:
    """Of a class of steps that are not padded: each number up to 16 for itself, then eight to an octave."""
    shift = max(0, num_tokens.bit_length() - 4)
    return num_tokens >> shift << shift
