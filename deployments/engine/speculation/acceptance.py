"""How likely a drafted token is right, learned from those that were tried. Pure: no clock.

By its place among the drafts: a model that guesses by its own guesses gets worse from place to place, a copy that has
been right so far gets better. What is known of a sequence's own drafts goes before what is known of all of their kind.
Asked and told for a whole batch at once, between two steps of a GPU that waits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Steps after which what was seen of a place before counts half: of all sequences, and of one.
_HALF_LIFE, _OWN_HALF_LIFE = 256.0, 16.0
# What is taken for granted weighs as much as so many tried drafts: of a place, that it is like all places of its kind;
# of a sequence, that it is like the others.
_PLACE_WEIGHT, _OWN_WEIGHT = 8.0, 4.0
_FEW = 8  # rows and places that there is room for at first


class Guess(NamedTuple):
    """Drafts of a sequence that could be tried.

    Attributes:
        request_id: of the sequence.
        kind: of the drafts.
        num_drafts: at least one.
    """

    request_id: str
    kind: int
    num_drafts: int


class Tried(NamedTuple):
    """Drafts of a sequence that were tried.

    Attributes:
        request_id: of the sequence.
        kind: of the drafts.
        num_right: so many of them were right; what stood behind a wrong one tells nothing.
        num_drafts: at least one.
    """

    request_id: str
    kind: int
    num_right: int
    num_drafts: int


class _Shares:
    """The share of tried drafts that were right, lately; of each place, in a row for each of what they belong to.

    Args:
        half_life: tries after which what was added before counts half.
        num_rows: see above.
    """

    def __init__(self, half_life: float, num_rows: int) -> None:
        self._kept = 0.5 ** (1 / half_life)
        self.counts = np.zeros((2, num_rows, _FEW))  # right, tried

    def reach(self, num_rows: int, num_places: int) -> None:
        """Have at least so many of each."""
        _, rows, places = self.counts.shape
        if num_rows > rows or num_places > places:
            more = (max(0, num_rows - rows), max(0, num_places - places))
            self.counts = np.pad(self.counts, ((0, 0), (0, more[0]), (0, more[1])))

    def rates(self, rows: np.ndarray, expected: np.ndarray, weight: float) -> np.ndarray:
        """(N, P) how likely drafts are right, if those before them are.

        Args:
            rows: (N,) to ask.
            expected: (N, P) or (N, 1) what is expected of each place ...
            weight: ... as firmly as if so many drafts had said so.
        """
        right, tried = self.counts[:, rows]
        rates: np.ndarray = (right + weight * expected) / (tried + weight)
        return rates

    def add(self, rows: np.ndarray, right: np.ndarray, tried: np.ndarray) -> None:
        """Count.

        Args:
            rows: (N,) each once.
            right: (N, P) drafts of each place that were.
            tried: (N, P) likewise. Those of one place and row are taken to have come at once.
        """
        kept = self._kept**tried
        share = (1 - kept) / (1 - self._kept) / np.maximum(tried, 1)
        places = self.counts[:, rows, : tried.shape[1]]
        self.counts[:, rows, : tried.shape[1]] = kept * places + share * np.stack((right, tried))


class Acceptance:
    """Of each kind of drafts, and of each sequence's.

    Args:
        num_kinds: of drafts.
    """

    def __init__(self, num_kinds: int) -> None:
        self._all = _Shares(_HALF_LIFE, num_kinds)
        self._all.counts[0, :, 0], self._all.counts[1, :, 0] = 1.0, 2.0
        self._kinds = _Shares(_HALF_LIFE, num_kinds)
        self._own = _Shares(_OWN_HALF_LIFE, _FEW)
        self._rows: dict[str, int] = {}
        self._free = list(range(1, _FEW))  # the first row stays empty, for those of whom nothing is known

    def rates(self, guesses: Sequence[Guess]) -> np.ndarray:
        """(N, P) how likely each of N sequences' next drafts is right, if those before it are; 0: there is none."""
        ids, kinds, counts = zip(*guesses, strict=True)
        num_places, kind_of = max(counts), np.array(kinds)
        self._reach(num_places)
        like = self._all.counts[0, :, 0] / self._all.counts[1, :, 0]
        rates = self._kinds.rates(np.arange(len(like)), like[:, None], _PLACE_WEIGHT)[kind_of]
        rows = [self._rows.get(request_id, 0) for request_id in ids]
        rates = self._own.rates(np.array(rows), rates, _OWN_WEIGHT)[:, :num_places]
        return np.where(np.arange(num_places) < np.array(counts)[:, None], rates, 0.0)

    def add(self, tried: Sequence[Tried]) -> None:
        """What became of drafts; each sequence once."""
        ids, kinds, rights, counts = zip(*tried, strict=True)
        num_right, kind_of = np.array(rights), np.array(kinds)
        self._reach(max(counts))
        places = np.arange(max(counts))
        is_right = (places < num_right[:, None]).astype(float)
        is_tried = (places < np.minimum(num_right + 1, counts)[:, None]).astype(float)
        self._own.add(np.array([self._row(request_id) for request_id in ids]), is_right, is_tried)
        for kind in np.unique(kind_of):
            own, row = kind_of == kind, np.array([kind])
            right, count = is_right[own].sum(0, keepdims=True), is_tried[own].sum(0, keepdims=True)
            self._kinds.add(row, right, count)
            self._all.add(row, right.sum(1, keepdims=True), count.sum(1, keepdims=True))

    def drop(self, request_id: str) -> None:
        """The sequence is over; unknown ids are no error."""
        if (row := self._rows.pop(request_id, None)) is not None:
            self._own.counts[:, row] = 0.0
            self._free.append(row)

    def _row(self, request_id: str) -> int:
        if (row := self._rows.get(request_id)) is None:
            if not self._free:
                num_rows = self._own.counts.shape[1]
                self._free.extend(range(num_rows, 2 * num_rows))
                self._own.reach(2 * num_rows, 0)
            row = self._rows[request_id] = self._free.pop()
        return row

    def _reach(self, num_places: int) -> None:
        self._kinds.reach(0, num_places)
        self._own.reach(0, num_places)
