"""Guesses that a sequence goes on as it did before: copies what stood behind the same tokens last time. No model.

Owns, for each sequence, where each of its n-grams was last followed by a token. A look takes a few microseconds,
however long the sequence is.

Source: prompt lookup decoding (Saxena, 2023); the copy may run into its own guess, as in LZ77 (Ziv, Lempel, 1977).
"""

from array import array

from torch import Tensor

from deployments.engine.scheduling.ids import token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.speculation.base import Prospect, Wish
from deployments.messages import Draws

# Lengths of n-grams, the longest first: the longer the match, the more often what follows is the same.
SIZES = (8, 4, 2)
_LONGEST = SIZES[0]
_WIDTH = token_array().itemsize
# Tokens of one sequence that are taken at once: a prompt of 100,000 would hold up everybody's step for 60 ms.
_TAKEN_AT_ONCE = 8192


class Index:
    """Where the n-grams of one sequence were followed by a token, the last time.

    Asked for each sequence between two steps of a GPU that waits: so places are counted in bytes, which are hashed.
    """

    def __init__(self) -> None:
        self.num_taken = 0
        # By hash, of each size.
        self._places: tuple[tuple[int, int, dict[int, int]], ...] = tuple((size, size * _WIDTH, {}) for size in SIZES)

    def take(self, tokens: "array[int]") -> bool:
        """Take in tokens that are new; false: more of them are left for the next time."""
        first, last = self.num_taken, len(tokens)
        if last - first > _TAKEN_AT_ONCE:
            last = first + _TAKEN_AT_ONCE
        begin = first - _LONGEST if first > _LONGEST else 0
        data = tokens[begin:last].tobytes()
        behind = (first - begin) * _WIDTH
        for size, num_bytes, places in self._places:
            place, end = (first, behind) if first > size else (size, num_bytes)
            while place < last:
                places[hash(data[end - num_bytes : end])] = place
                place += 1
                end += _WIDTH
        self.num_taken = last
        return last == len(tokens)

    def find(self, tokens: "array[int]") -> tuple[int, int] | None:
        """Where the tokens that are last now were followed by another one, and of how many it is known that they match.

        Those are one of `SIZES`, or twice the longest.
        """
        newest = tokens[-2 * _LONGEST :].tobytes()
        for size, num_bytes, places in self._places:
            match = newest[-num_bytes:]
            place = places.get(hash(match))
            if place is None:
                continue
            before = tokens[place - 2 * _LONGEST if place > 2 * _LONGEST else 0 : place].tobytes()
            if before[-num_bytes:] == match:  # two may have the same hash
                is_longer = size == _LONGEST and before == newest
                return place, 2 * size if is_longer else size
        return None


class LookupDrafter:
    """See the module; a `Drafter`."""

    num_kinds = 4  # matches of 2, 4, 8 and 16 tokens or more

    def __init__(self) -> None:
        self._indices: dict[str, Index] = {}
        self._found: dict[str, tuple[int, int]] = {}  # by the last look

    def look(self, wish: Wish) -> Prospect | None:
        sequence, num_tokens = wish
        index = self._indices.get(sequence.request_id)
        if index is None:
            index = self._indices[sequence.request_id] = Index()
        found = index.find(sequence.token_ids) if index.take(sequence.token_ids) else None
        if found is None:
            return None
        self._found[sequence.request_id] = found
        return Prospect(num_tokens, found[1].bit_length() - 2)

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        return [self._copy(wish) for wish in wishes]

    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None) -> None:
        """Tokens are all that it goes by."""

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def drop(self, request_id: str) -> None:
        self._indices.pop(request_id, None)
        self._found.pop(request_id, None)

    def _copy(self, wish: Wish) -> tuple[int, ...]:
        tokens = wish.sequence.token_ids
        place, _ = self._found[wish.sequence.request_id]
        drafts = tokens[place : place + wish.num_tokens]
        period = len(tokens) - place
        while len(drafts) < wish.num_tokens:
            drafts.append(drafts[len(drafts) - period])
        return tuple(drafts)
