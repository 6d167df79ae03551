"""What can be set on the hand-off of KV, what it counts, what it takes. Plain values; nothing of Ray."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

from deployments.messages import ChunkReady

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.handoff.outgoing import Told


class Handoff(Protocol):
    """What a method that exports KV returns: chunks of the configured layout and device, to come or complete.

    See `TakenHandoff`. A chunk is contiguous; what was told of is not written to until it is released.
    """

    def watch(self, told: "Told") -> None:
        """Be told of all that is complete, and of what will be."""
        ...

    def release(self, index: int) -> None:
        """The receiver has a chunk."""
        ...

    def let_go(self) -> None:
        """Nobody receives it any more."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chunk that has arrived, or some layers of one.

    Attributes:
        chunk: what it is, without the request.
        tensor: the KV, complete.
        complete_s: monotonic time when this process heard that it is complete.
        num_parts: that the chunk comes in.
        is_lent: it is the memory of the source itself.
    """

    chunk: ChunkReady
    tensor: "Tensor"
    complete_s: float
    num_parts: int = 1
    is_lent: bool = False


class Arrivals(Protocol):
    """What a method that receives KV gets: a hand-off, as it comes."""

    def __iter__(self) -> Iterator[Arrival]:
        """All of it, each part once, as soon as it is complete; for one thread, which waits here.

        Raises:
            TransferError: it cannot be brought.
        """
        ...

    def release(self, index: int) -> None:
        """A chunk is read no more: its source may use its memory for others. From any thread; never waits."""
        ...


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Bounds of every wait. Both ends of a pair should have the same.

    Attributes:
        connect_timeout_s: forming a group of two, and any answer of the other engine.
        transfer_timeout_s: one chunk, once it is on its way; also the bound for a peer that hangs.
        probe_interval_s: while a peer is waited for, it is asked this often whether it lives.
        idle_probe_interval_s: the same for a pair with nothing to do.
        doubt_after_s: a peer that leaves the question open this long is in doubt: the transfer in progress may still
            finish, those behind it fail at once, so that a hung peer holds one thread of the receiver and not all.
        idle_timeout_s: a pair unused for so long gives its group back.
    """

    connect_timeout_s: float = 10.0
    transfer_timeout_s: float = 30.0
    probe_interval_s: float = 0.25
    idle_probe_interval_s: float = 3.0
    doubt_after_s: float = 2.0
    idle_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} is {value}, must be above 0")


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Counters of one process since it started, and what it holds now.

    Attributes:
        num_received: chunks pulled from other engines.
        num_received_bytes: their size.
        num_read_in_place: of these, chunks that were read in another engine's memory on the same machine.
        receive_s: time in which one of the others at least was on its way, from the source's word to its last byte.
        num_sent: chunks sent to other engines.
        num_failed: chunks whose transfer failed, on either end.
        num_links: pairs that are open now; a pair that sends in both directions counts twice.
        num_neighbours: engines of this machine whose memory is mapped here.
        num_held: hand-offs that were given away here and are still referenced somewhere.
    """

    num_received: int = 0
    num_received_bytes: int = 0
    num_read_in_place: int = 0
    receive_s: float = 0.0
    num_sent: int = 0
    num_failed: int = 0
    num_links: int = 0
    num_neighbours: int = 0
    num_held: int = 0
