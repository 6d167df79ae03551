"""What is in the tier, or in one shard of it: which objects, whose bytes they are, when they were last used.

Owns the byte budget: what is there never exceeds it, nor does what is on its way, which makes room only when it has
come: an engine that offers much and gives nothing takes nothing from others. References are opaque: it knows no Ray,
and copies nothing. No clock, not thread-safe: lives with whoever holds the references.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Generic, TypeVar

from deployments.kv_tier.policy import Kept, choose_victims, room_to_make

Ref = TypeVar("Ref")
# For which requests the blocks of an object were computed, one for each block; None: long before.
Origins = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """An object that an engine could give.

    Attributes:
        key: its name.
        num_bytes: of it.
        depth: blocks of its sequence up to its end.
    """

    key: bytes
    num_bytes: int
    depth: int


@dataclass(frozen=True, slots=True)
class Found(Generic[Ref]):
    """An object that is there, or was when somebody looked.

    Attributes:
        key: its name.
        num_bytes: of it.
        origins: see there.
        ref: to its bytes.
    """

    key: bytes
    num_bytes: int
    origins: Origins
    ref: Ref


@dataclass(slots=True)
class TierCounts:
    """Counters since start and gauges of now.

    Attributes:
        num_objects: that are there.
        num_bytes: of them.
        num_pending: on their way.
        num_pending_bytes: of them.
        num_accepted: offers.
        num_refused: offers: they are there already, or on their way, or too large.
        num_given_up: accepted ones that did not come.
        num_evicted: objects that made room.
        num_lost: objects that somebody could not read.
    """

    num_objects: int = 0
    num_bytes: int = 0
    num_pending: int = 0
    num_pending_bytes: int = 0
    num_accepted: int = 0
    num_refused: int = 0
    num_given_up: int = 0
    num_evicted: int = 0
    num_lost: int = 0

    def __add__(self, other: "TierCounts") -> "TierCounts":
        """Of two parts together."""
        return TierCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class TierIndex(Generic[Ref]):
    """See the module.

    Args:
        max_bytes: of all objects.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._objects: dict[bytes, Found[Ref]] = {}
        self._kept: dict[bytes, Kept] = {}
        self._pending: dict[bytes, Offer] = {}
        self._counts = TierCounts()

    def counts(self) -> TierCounts:
        """A snapshot."""
        return replace(self._counts)

    def accept(self, offers: Iterable[Offer], now_s: float) -> list[Offer]:
        """Which of these to fetch from the engine; each must be stored or given up afterwards.

        What is known counts as used: somebody has just had it.
        """
        accepted: list[Offer] = []
        for offer in offers:
            if offer.key in self._kept:
                self._touch(offer.key, now_s)
            elif offer.key not in self._pending and self._counts.num_pending_bytes + offer.num_bytes <= self._max_bytes:
                self._pending[offer.key] = offer
                self._count_pending(offer, 1)
                accepted.append(offer)
                continue
            self._counts.num_refused += 1
        self._counts.num_accepted += len(accepted)
        return accepted

    def store(self, offer: Offer, origins: Origins, ref: Ref, now_s: float) -> None:
        """An accepted object is there; others make room for it."""
        self._count_pending(self._pending.pop(offer.key), -1)
        for key in choose_victims(
            self._kept, room_to_make(self._counts.num_bytes, offer.num_bytes, self._max_bytes), now_s
        ):
            self._drop(key)
            self._counts.num_evicted += 1
        self._objects[offer.key] = Found(offer.key, offer.num_bytes, origins, ref)
        self._kept[offer.key] = Kept(offer.num_bytes, now_s, offer.depth)
        self._counts.num_objects += 1
        self._counts.num_bytes += offer.num_bytes

    def give_up(self, offer: Offer) -> None:
        """An accepted object does not come."""
        self._count_pending(self._pending.pop(offer.key), -1)
        self._counts.num_given_up += 1

    def find(self, keys: Sequence[bytes], now_s: float) -> list[Found[Ref]]:
        """Those of these objects that are there; they are used now."""
        found = [self._objects[key] for key in keys if key in self._objects]
        for one in found:
            self._touch(one.key, now_s)
        return found

    def lose(self, keys: Iterable[bytes]) -> None:
        """Somebody could not read these objects: nobody else shall try. Unknown ones are no error."""
        for key in keys:
            if key in self._objects:
                self._drop(key)
                self._counts.num_lost += 1

    def clear(self) -> None:
        """Give all up that is there."""
        for key in list(self._objects):
            self._drop(key)

    def check_integrity(self) -> None:
        """Assert that every byte is counted once, and that they are within the budget."""
        counts = self._counts
        assert self._objects.keys() == self._kept.keys(), "objects and what is kept of them disagree"
        assert not self._objects.keys() & self._pending.keys(), "an object is there and on its way"
        assert counts.num_objects == len(self._objects)
        assert counts.num_bytes == sum(one.num_bytes for one in self._objects.values())
        assert counts.num_pending == len(self._pending)
        assert counts.num_pending_bytes == sum(offer.num_bytes for offer in self._pending.values())
        assert counts.num_bytes <= self._max_bytes, "more than the budget"
        assert counts.num_pending_bytes <= self._max_bytes, "more than the budget is on its way"
        gone = counts.num_given_up + counts.num_pending + counts.num_objects + counts.num_evicted + counts.num_lost
        assert gone <= counts.num_accepted, "more objects than were accepted"

    def _touch(self, key: bytes, now_s: float) -> None:
        self._kept[key] = replace(self._kept[key], last_use_s=now_s)

    def _drop(self, key: bytes) -> None:
        del self._kept[key]
        self._counts.num_bytes -= self._objects.pop(key).num_bytes
        self._counts.num_objects -= 1

    def _count_pending(self, offer: Offer, sign: int) -> None:
        self._counts.num_pending += sign
        self._counts.num_pending_bytes += sign * offer.num_bytes
