"""How likely a drafted token is right, learned from those that were tried. Pure: no clock."""

# Tried drafts after which what was seen before counts half: of all sequences, and of one.
_HALF_LIFE, _OWN_HALF_LIFE = 256.0, 16.0
# A sequence of which nothing was seen is taken to be like the others; that weighs as much as so many tried drafts.
_PRIOR_WEIGHT = 4.0


class Share:
    """The share of tried drafts that were right, lately.

    Args:
        half_life: tries after which what was added before counts half.
        right: to begin with.
        tried: likewise.
    """

    __slots__ = ("_half_life", "right", "tried")

    def __init__(self, half_life: float, right: float = 0.0, tried: float = 0.0) -> None:
        self._half_life = half_life
        self.right, self.tried = right, tried

    def add(self, num_right: int, num_tried: int) -> None:
        keep = 0.5 ** (num_tried / self._half_life)
        self.right, self.tried = keep * self.right + num_right, keep * self.tried + num_tried


class Acceptance:
    """Of each kind of drafts, and of each sequence's.

    Args:
        num_kinds: of drafts.
    """

    def __init__(self, num_kinds: int) -> None:
        self._kinds = [Share(_HALF_LIFE, 1.0, 2.0) for _ in range(num_kinds)]
        self._own: dict[str, Share] = {}

    def rate(self, request_id: str, kind: int) -> float:
        """How likely each next draft of a sequence is right, if those before it were."""
        like = self._kinds[kind]
        rate = like.right / like.tried
        own = self._own.get(request_id)
        if own is None:
            return rate
        return (own.right + _PRIOR_WEIGHT * rate) / (own.tried + _PRIOR_WEIGHT)

    def add(self, request_id: str, kind: int, num_right: int, num_drafts: int) -> None:
        """So many drafts were tried, of which so many were right; what stood behind a wrong one tells nothing."""
        num_tried = min(num_right + 1, num_drafts)
        self._kinds[kind].add(num_right, num_tried)
        own = self._own.get(request_id)
        if own is None:
            own = self._own[request_id] = Share(_OWN_HALF_LIFE)
        own.add(num_right, num_tried)

    def drop(self, request_id: str) -> None:
        self._own.pop(request_id, None)
