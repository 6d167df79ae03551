"""What can be set on the hand-off of KV, what it counts, what it takes. Plain values; nothing of Ray."""

from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from deployments.messages import DrawnToken

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Export:
    """What a method that exports KV returns.

    Attributes:
        tensor: the chunk, complete or not; from now on it is not written to but by whoever completes it.
        completion: done when it is complete, on a GPU too; the result goes to the receiver with it. Cancelled if it
            never will be.
        cuts: layers at which it is cut into parts, each of which goes to the receiver as soon as it is complete; none:
            it goes whole.
        earlier: as `completion`, of the parts before the last, in order.
    """

    tensor: "Tensor"
    completion: Future[DrawnToken | None]
    cuts: tuple[int, ...] = ()
    earlier: tuple[Future[DrawnToken | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a method that receives KV gets: a chunk, or a part of one.

    Attributes:
        tensor: the KV, complete.
        first_token: what the completion of the export has brought.
        complete_s: monotonic time when this process heard that it is complete.
        layers: the first one whose KV it is, and the one behind the last; None: it is that of all.
        is_lent: it is the source's own memory, or a part of it.
    """

    tensor: "Tensor"
    first_token: DrawnToken | None
    complete_s: float
    layers: tuple[int, int] | None = None
    is_lent: bool = False


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
        num_held: chunks that were produced here and are still referenced somewhere.
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
