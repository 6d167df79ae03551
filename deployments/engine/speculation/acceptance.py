"""How likely a drafted token is right, learned from those that were tried. Pure: no clock.

By its place among the drafts: a model that guesses by its own guesses gets worse from place to place, a copy that has
been right so far gets better. What is known of a sequence's own drafts goes before what is known of all of their kind.
Asked and told for a whole batch at once, between two steps of a GPU that waits.
"""
# mypy: disable-error-code="untyped-decorator"

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deployments.engine.compiled import njit

# Steps after which what was seen of a place before counts half: of all sequences, and of one.
_HALF_LIFE, _OWN_HALF_LIFE = 256.0, 16.0
# What is taken for granted weighs as much as so many tried drafts: of a place, that it is like all places of its kind;
# of a sequence, that it is like the others.
_PLACE_WEIGHT, _OWN_WEIGHT = 8.0, 4.0
_FEW = 8  # rows and places that there is room for at first


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


class Acceptance:
    """Of each kind of drafts, and of each sequence's.

    Args:
        num_kinds: of drafts.
    """

    def __init__(self, num_kinds: int) -> None:
        # Shares of right ones, lately: what was right, and what was tried; of each kind, of each place of it, and ...
        self._all = np.zeros((2, num_kinds))
        self._all[0], self._all[1] = 1.0, 2.0
        self._kinds = np.zeros((2, num_kinds, _FEW))
        # ... of each place of a sequence. The first row stays empty, for those of whom nothing is known.
        self._own = np.zeros((2, _FEW, _FEW))
        self._rows: dict[str, int] = {}
        self._free = list(range(1, _FEW))

    def rates(self, request_ids: Sequence[str], kinds: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """How likely the next drafts of N sequences are right, if those before them are.

        Args:
            request_ids: of the N sequences.
            kinds: of their drafts.
            counts: so many drafts of each; at least one.

        Returns:
            (N, P); 0 where there is no draft.
        """
        self._reach(max(counts))
        row_of = self._rows
        rows = np.array([row_of.get(request_id, 0) for request_id in request_ids])
        rates: np.ndarray = _rates(self._all, self._kinds, self._own, rows, np.array(kinds), np.array(counts))
        return rates

    def add(self, tried: Sequence[Tried]) -> None:
        """What became of drafts; each sequence once."""
        ids, kinds, rights, counts = zip(*tried, strict=True)
        self._reach(max(counts))
        rows = np.array([self._row(request_id) for request_id in ids])
        _add(self._all, self._kinds, self._own, rows, np.array(kinds), np.array(rights), np.array(counts))

    def drop(self, request_id: str) -> None:
        """The sequence is over; unknown ids are no error."""
        if (row := self._rows.pop(request_id, None)) is not None:
            self._own[:, row] = 0.0
            self._free.append(row)

    def _row(self, request_id: str) -> int:
        if (row := self._rows.get(request_id)) is None:
            if not self._free:
                num_rows = self._own.shape[1]
                self._free.extend(range(num_rows, 2 * num_rows))
                self._own = np.pad(self._own, ((0, 0), (0, num_rows), (0, 0)))
            row = self._rows[request_id] = self._free.pop()
        return row

    def _reach(self, num_places: int) -> None:
        """Have room for so many places."""
        if (more := num_places - self._own.shape[2]) > 0:
            self._own = np.pad(self._own, ((0, 0), (0, 0), (0, more)))
            self._kinds = np.pad(self._kinds, ((0, 0), (0, 0), (0, more)))


# Compiled, for a GPU waits for them: numpy takes ten times as long, nearly all of it for calling.
@njit(cache=True)
def _rates(
    of_all: np.ndarray, of_kinds: np.ndarray, own: np.ndarray, rows: np.ndarray, kinds: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """(N, P) see `Acceptance.rates`.

    Args:
        of_all: (2, K) right and tried, of each kind.
        of_kinds: (2, K, places) likewise, of each place of a kind.
        own: (2, rows, places) likewise, of each place of a sequence.
        rows: (N,) of the sequences.
        kinds: (N,) of their drafts.
        counts: (N,) so many drafts.
    """
    rates = np.zeros((len(rows), counts.max()))
    for number in range(len(rows)):
        row, kind = rows[number], kinds[number]
        like = of_all[0, kind] / of_all[1, kind]
        for place in range(counts[number]):
            expected = (of_kinds[0, kind, place] + _PLACE_WEIGHT * like) / (of_kinds[1, kind, place] + _PLACE_WEIGHT)
            rates[number, place] = (own[0, row, place] + _OWN_WEIGHT * expected) / (own[1, row, place] + _OWN_WEIGHT)
    return rates


@njit(cache=True)
def _add(
    of_all: np.ndarray,
    of_kinds: np.ndarray,
    own: np.ndarray,
    rows: np.ndarray,
    kinds: np.ndarray,
    rights: np.ndarray,
    counts: np.ndarray,
) -> None:
    """See `Acceptance.add`; `rights`: (N,) so many drafts were right, the others as in `_rates`."""
    now = np.zeros((2, of_kinds.shape[1], counts.max()))  # as `of_kinds`, in this step
    for number in range(len(rows)):
        row, kind = rows[number], kinds[number]
        for place in range(min(rights[number] + 1, counts[number])):
            is_right = place < rights[number]
            own[:, row, place] *= 0.5 ** (1 / _OWN_HALF_LIFE)
            own[0, row, place] += is_right
            own[1, row, place] += 1
            now[0, kind, place] += is_right
            now[1, kind, place] += 1
    for kind in range(now.shape[1]):
        for place in range(now.shape[2]):
            _join(of_kinds[:, kind, place], now[0, kind, place], now[1, kind, place])
        _join(of_all[:, kind], now[0, kind].sum(), now[1, kind].sum())


@njit(cache=True)
def _join(shares: np.ndarray, right: float, tried: float) -> None:
    """(2,) Right and tried, with so many more that are taken to have come one by one, each as right as the others."""
    if tried == 0:
        return
    kept = 0.5 ** (1 / _HALF_LIFE)
    weight = (1 - kept**tried) / (1 - kept) / tried
    shares *= kept**tried
    shares[0] += weight * right
    shares[1] += weight * tried
