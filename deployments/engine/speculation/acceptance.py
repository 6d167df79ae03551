"""How likely a drafted token is right, learned from those that were tried. Pure: no clock.

By its place among the drafts: a model that guesses by its own guesses gets worse from place to place, a copy that has
been right so far gets better. What is known of a sequence's own drafts goes before what is known of all of their kind.
"""

from collections.abc import Sequence

# Steps after which what was seen of a place before counts half: of all sequences, and of one.
_HALF_LIFE, _OWN_HALF_LIFE = 256.0, 16.0
# What is taken for granted weighs as much as so many tried drafts: of a place, that it is like all places of its kind;
# of a sequence, that it is like the others.
_PLACE_WEIGHT, _OWN_WEIGHT = 8.0, 4.0


class Share:
    """The share of tried drafts that were right, lately.

    Args:
        half_life: tries after which what was added before counts half.
        right: to begin with.
        tried: likewise.
    """

    __slots__ = ("_kept", "right", "tried")

    def __init__(self, half_life: float, right: float = 0.0, tried: float = 0.0) -> None:
        self._kept = 0.5 ** (1 / half_life)
        self.right, self.tried = right, tried

    def add(self, is_right: bool) -> None:
        kept = self._kept
        self.right, self.tried = kept * self.right + is_right, kept * self.tried + 1


class _Places:
    """Of each place among drafts.

    Args:
        half_life: see `Share`.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._shares: list[Share] = []

    def rates(self, expected: Sequence[float], weight: float) -> list[float]:
        """How likely drafts are right, if those before them are; with what is expected of each, and how firmly."""
        shares = self._shares
        tried = [(p.right + weight * rate) / (p.tried + weight) for p, rate in zip(shares, expected, strict=False)]
        return tried + list(expected[len(tried) :])

    def add(self, num_right: int, num_tried: int) -> None:
        while len(self._shares) < num_tried:
            self._shares.append(Share(self._half_life))
        for place in range(num_tried):
            self._shares[place].add(place < num_right)


class Acceptance:
    """Of each kind of drafts, and of each sequence's.

    Args:
        num_kinds: of drafts.
    """

    def __init__(self, num_kinds: int) -> None:
        self._all = [Share(_HALF_LIFE, 1.0, 2.0) for _ in range(num_kinds)]
        self._kinds = [_Places(_HALF_LIFE) for _ in range(num_kinds)]
        self._own: dict[str, _Places] = {}

    def rates(self, request_id: str, kind: int, num_drafts: int) -> list[float]:
        """How likely each of a sequence's next drafts is right, if those before it are."""
        like = self._all[kind]
        rates = self._kinds[kind].rates([like.right / like.tried] * num_drafts, _PLACE_WEIGHT)
        own = self._own.get(request_id)
        return rates if own is None else own.rates(rates, _OWN_WEIGHT)

    def add(self, request_id: str, kind: int, num_right: int, num_drafts: int) -> None:
        """So many drafts were tried, of which so many were right; what stood behind a wrong one tells nothing."""
        num_tried = min(num_right + 1, num_drafts)
        own = self._own.get(request_id)
        if own is None:
            own = self._own[request_id] = _Places(_OWN_HALF_LIFE)
        for places in (own, self._kinds[kind]):
            places.add(num_right, num_tried)
        for place in range(num_tried):
            self._all[kind].add(place < num_right)

    def drop(self, request_id: str) -> None:
        self._own.pop(request_id, None)
