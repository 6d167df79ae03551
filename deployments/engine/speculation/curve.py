"""What a step of so many tokens takes, learned from steps that were run anyway. Pure: no clock."""
# mypy: disable-error-code="untyped-decorator"

from collections.abc import Sequence
from math import inf

import numpy as np

from deployments.engine.compiled import njit

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
_NOT_PADDED = np.array([], dtype=np.int64)


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
        size = _class_of(num_tokens, self._drafted_sizes if has_drafts else _NOT_PADDED)
        self._learn_bias(size, seconds, has_drafts)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        self._seconds[size] = self._joined(self._seconds.get(size, inf), seconds, count)
        self._last[size] = self._num_steps
        if self._num_steps % _MEMORY_STEPS == 0:
            self._forget()

    def is_known(self, num_tokens: int) -> bool:
        """Whether enough of such steps without drafts were run lately to compare others with them."""
        return self._counts.get(_class_of(num_tokens, _NOT_PADDED), 0) >= _FEW_STEPS

    def is_judged(self, num_tokens: int) -> bool:
        """Whether enough steps with drafts, of so many tokens, were run lately to know what one takes."""
        return self._counts.get(_class_of(num_tokens, self._drafted_sizes), 0) >= _FEW_STEPS

    def seconds(self, num_tokens: int) -> float:
        """Of a step without drafts, at least. 0: nothing is known."""
        size = _class_of(num_tokens, _NOT_PADDED)
        return self._seconds[size] if size in self._seconds else float(self._estimates(np.array([size]))[0])

    def drafted_seconds(self, num_tokens: np.ndarray) -> np.ndarray:
        """(N,) of steps of so many tokens, (N,), with drafts; at least. 0: nothing is known.

        Where steps are padded, no less than of a smaller one, nor more than of a larger one.
        """
        sizes = _classes_of(num_tokens, self._drafted_sizes)
        seconds = self._on_lines(sizes) if len(self._drafted_sizes) == 0 else None
        if seconds is None:
            seconds = self._estimates(sizes)
        seconds *= self._bias
        seconds[num_tokens > self._max_tokens] = inf
        return seconds

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

    def _estimates(self, sizes: np.ndarray) -> np.ndarray:
        """(N,) of steps of such sizes; no less than of a smaller one that was judged, nor more than of a larger one."""
        known = np.fromiter(self._seconds, np.int64, len(self._seconds))
        seconds = np.fromiter(self._seconds.values(), np.float64, len(known))
        counts = np.fromiter(self._counts.values(), np.int64, len(known))
        estimates: np.ndarray = _estimates(sizes, known, seconds, counts)
        return estimates

    def _forget(self) -> None:
        for size in [size for size, last in self._last.items() if self._num_steps - last >= _MEMORY_STEPS]:
            del self._seconds[size], self._counts[size], self._last[size]


# Compiled, as GPUs wait for what they tell: numpy takes ten times as long, nearly all of it for calling.
@njit(cache=True)
def _class_of(num_tokens: int, padded: np.ndarray) -> int:
    """The size that steps of so many tokens are padded to, or whose class they are of.

    Those that are not padded: each number up to 16 for itself, then eight to an octave.
    """
    place = np.searchsorted(padded, num_tokens)
    if place < len(padded):
        return int(padded[place])
    shift = 0
    while num_tokens >> shift >= 16:
        shift += 1
    return num_tokens >> shift << shift


@njit(cache=True)
def _classes_of(num_tokens: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """(N,) of each."""
    classes = np.empty(len(num_tokens), np.int64)
    for place, number in enumerate(num_tokens):
        classes[place] = _class_of(number, padded)
    return classes


@njit(cache=True)
def _estimates(sizes: np.ndarray, known: np.ndarray, seconds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(N,) see `StepCurve`; of the (K,) sizes that are known, what steps take, and how many were run.

    It is fast where equal ones come in a row.
    """
    estimates = np.zeros(len(sizes))
    for number, size in enumerate(sizes):
        if number and size == sizes[number - 1]:
            estimates[number] = estimates[number - 1]
            continue
        own, judged, least, larger = -1.0, -1.0, inf, inf  # of this size; of smaller ones; of larger ones
        for place in range(len(known)):
            is_judged = counts[place] >= _FEW_STEPS
            if known[place] < size:
                least = min(least, seconds[place])
                judged = max(judged, seconds[place] if is_judged else -1.0)
            else:
                larger = min(larger, seconds[place])
                own = seconds[place] if known[place] == size and is_judged else own
        smaller = judged if judged >= 0 else 0.0 if least == inf else least
        estimates[number] = own if own >= 0 else min(smaller, larger)
    return estimates
