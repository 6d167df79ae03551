"""The shared tier of a service under test: how it is turned on, and what is left in it when nothing is asked any more.

Counted twice: by the index, which asserts that each byte is counted once, and by Ray's object store, which knows no
index. When the index gives all up, the store has to lose as much as the index said it had.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray._private import internal_api

from deployments.kv_tier.ray_store import counts_of, shards
from deployments.kv_tier.settings import TierSettings

# Objects of one block: as many of them as can be.
OBJECT_BYTES = 1
_SETTLE_S = 60.0
_POLL_S = 0.5
# Of the object store's bytes: it has other objects, that come and go.
_SPARE_SHARE = 0.05
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Left:
    """What is in the tier at the end.

    Attributes:
        max_bytes: its budget.
        num_objects: that the index has.
        num_bytes: of them.
        num_pending: on their way still.
        num_accepted: since it began; of them
        num_evicted: made room,
        num_given_up: never came, and
        num_lost: could not be read.
        stored_bytes: in Ray's object store. The tier is small enough that nothing is spilled.
        num_kept: objects that the index still has when it has given all up.
        freed_bytes: that the object store has less by then.
    """

    max_bytes: int
    num_objects: int
    num_bytes: int
    num_pending: int
    num_accepted: int
    num_evicted: int
    num_given_up: int
    num_lost: int
    stored_bytes: int
    num_kept: int
    freed_bytes: int

    def problems(self) -> Iterator[str]:
        """In words what should not be."""
        spare = int(self.num_bytes * _SPARE_SHARE) + _MIB
        if not self.num_accepted:
            yield "the tier was given nothing"
        if self.num_bytes > self.max_bytes:
            yield f"{self.num_bytes} bytes are in the tier, {self.max_bytes} allowed"
        if self.num_pending:
            yield f"{self.num_pending} objects are on their way to the tier though nothing runs"
        if self.stored_bytes < self.num_bytes:
            yield f"the index counts {self.num_bytes} bytes, the object store has {self.stored_bytes}"
        if self.num_kept:
            yield f"{self.num_kept} objects are left in the tier when all are given up"
        if abs(self.freed_bytes - self.num_bytes) > spare:
            yield f"the object store lost {self.freed_bytes} bytes where the tier gave up {self.num_bytes}"


def arguments(max_bytes: int) -> list[str]:
    """For the application; 0 bytes: it has no tier."""
    return [f"tier.max_bytes={max_bytes}", f"tier.object_bytes={OBJECT_BYTES}"]


def count(max_bytes: int) -> Left:
    """Count what is in the tier of so many bytes, have it given up, and count again; no requests run."""
    tier = TierSettings(max_bytes=max_bytes, object_bytes=OBJECT_BYTES)
    deadline_s = time.monotonic() + _SETTLE_S
    while any(one.num_pending for one in counts_of(tier)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    found, stored = counts_of(tier), _stored_bytes()
    num_bytes = sum(one.num_bytes for one in found)
    ray.get([shard.clear.remote() for shard in shards(tier)])
    left = counts_of(tier)
    return Left(
        max_bytes=tier.max_bytes,
        num_objects=sum(one.num_objects for one in found),
        num_bytes=num_bytes,
        num_pending=sum(one.num_pending for one in found),
        num_accepted=sum(one.num_accepted for one in found),
        num_evicted=sum(one.num_evicted for one in found),
        num_given_up=sum(one.num_given_up for one in found),
        num_lost=sum(one.num_lost for one in found),
        stored_bytes=stored,
        num_kept=sum(one.num_objects for one in left),
        freed_bytes=_await_freed(stored, num_bytes),
    )


def _await_freed(stored_bytes: int, num_bytes: int) -> int:
    """Bytes that the object store loses within a minute, or sooner if these are as many; Ray frees them by and by."""
    deadline_s, freed = time.monotonic() + _SETTLE_S, 0
    while time.monotonic() < deadline_s and freed < num_bytes:
        time.sleep(_POLL_S)
        freed = stored_bytes - _stored_bytes()
    return freed


def _stored_bytes() -> int:
    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(internal_api.get_memory_info_reply(state).store_stats.object_store_bytes_used)
