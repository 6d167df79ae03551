"""Guesses that a sequence goes on as it did before: copies what stood behind the same tokens last time. No model.

Owns, for each sequence, where each of its n-grams was last followed by a token. A look takes a few microseconds,
however long the sequence is.

Source: prompt lookup decoding (Saxena, 2023); the copy may run into its own guess, as in LZ77 (Ziv, Lempel, 1977).
"""

from array import array

import numpy as np
from torch import Tensor

from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.speculation.base import Prospect, Wish
from deployments.messages import Draws

# Lengths of n-grams, the longest first: the longer the match, the more often what follows is the same.
SIZES = (8, 4, 2)
# A match is looked at so far back, to say of which kind it is.
_LONGEST_MATCH = 16
# Tokens of one sequence that are taken at once: a prompt of 100,000 would hold up everybody's step for 60 ms.
_TAKEN_AT_ONCE = 8192
_FACTOR, _MODULUS_BITS = 0x9E3779B97F4A7C15, 64
_MODULUS = (1 << _MODULUS_BITS) - 1


class Index:
    """Where the n-grams of one sequence were followed by a token, the last time."""

    def __init__(self) -> None:
        self.num_taken = 0
        self._places: dict[int, dict[int, int]] = {size: {} for size in SIZES}

    def take(self, tokens: "array[int]") -> bool:
        """Take in tokens that are new; false: more of them are left for the next time."""
        first, last = self.num_taken, min(len(tokens), self.num_taken + _TAKEN_AT_ONCE)
        if last - first < 64:
            for place in range(first, last):
                for size, places in self._places.items():
                    if place >= size:
                        places[_key(tokens[place - size : place])] = place
        else:
            for size, places in self._places.items():
                begin = max(first - size, 0)
                if last - begin > size:
                    keys = _keys(np.frombuffer(tokens[begin : last - 1], np.uint32), size)
                    places.update(zip(keys.tolist(), range(begin + size, last), strict=True))
        self.num_taken = last
        return last == len(tokens)

    def find(self, tokens: "array[int]") -> tuple[int, int] | None:
        """Where the tokens that are last now were followed by another one, and how many of them were the same."""
        end = len(tokens)
        for size, places in self._places.items():
            place = places.get(_key(tokens[end - size :])) if end >= size else None
            if place is not None and tokens[place - size : place] == tokens[end - size :]:
                return place, _match_length(tokens, place, end, size)
        return None


class LookupDrafter:
    """See the module; a `Drafter`."""

    num_kinds = 4  # matches of 2, 4, 8 and 16 tokens or more

    def __init__(self) -> None:
        self._indices: dict[str, Index] = {}

    def look(self, wish: Wish) -> Prospect | None:
        sequence, num_tokens = wish
        index = self._indices.get(sequence.request_id)
        if index is None:
            index = self._indices[sequence.request_id] = Index()
        found = index.find(sequence.token_ids) if index.take(sequence.token_ids) else None
        if found is None:
            return None
        return Prospect(num_tokens, min(found[1], _LONGEST_MATCH).bit_length() - 2)

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        return [self._copy(wish) for wish in wishes]

    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None) -> None:
        """Tokens are all that it goes by."""

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def drop(self, request_id: str) -> None:
        self._indices.pop(request_id, None)

    def _copy(self, wish: Wish) -> tuple[int, ...]:
        tokens = wish.sequence.token_ids
        found = self._indices[wish.sequence.request_id].find(tokens)
        assert found is not None, f"{wish.sequence.request_id}: there was a match just now"
        drafts = tokens[found[0] : found[0] + wish.num_tokens]
        period = len(tokens) - found[0]
        while len(drafts) < wish.num_tokens:
            drafts.append(drafts[len(drafts) - period])
        return tuple(drafts)


def _key(tokens: "array[int]") -> int:
    """Of an n-gram; two that differ have the same one hardly ever, and then it is seen."""
    key = 0
    for token in tokens:
        key = (key * _FACTOR + token + 1) & _MODULUS
    return key


def _keys(tokens: np.ndarray, size: int) -> np.ndarray:
    """(N - size + 1,) uint64 of all n-grams of (N,) tokens."""
    num_keys = len(tokens) - size + 1
    keys = np.zeros(num_keys, np.uint64)
    for offset in range(size):
        keys = keys * np.uint64(_FACTOR) + tokens[offset : offset + num_keys] + np.uint64(1)
    return keys


def _match_length(tokens: "array[int]", place: int, end: int, length: int) -> int:
    """Of how many tokens before both places are the same, as far as that matters."""
    longest = min(_LONGEST_MATCH, place)
    while length < longest and tokens[place - length - 1] == tokens[end - length - 1]:
        length += 1
    return length
