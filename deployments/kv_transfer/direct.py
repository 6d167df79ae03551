"""KV as Ray Direct Transport objects. The one file of the project that knows that part of Ray.

A method under `exports_kv` returns a hand-off; Ray keeps a tensor that stands for it and hands out a reference. As a
positional argument of a method under `receives_kv` it arrives there as what comes of the hand-off. Its chunks are freed
at their source one by one as they are released, and all when the last reference is gone. The reference is passed on
once, before anything is computed: what Ray does to it takes longer than a step, and only the bytes wait for them.

    @ray.remote(**ENGINE_ACTOR_OPTIONS)
    class EngineActor:
        @exports_kv
        def take_handoff(self, request_id: str) -> Handoff: ...
        @receives_kv
        def receive_kv(self, request_id: str, arrivals: Arrivals) -> None: ...

    ack = decode.receive_kv.remote(request_id, prefill.take_handoff.remote(request_id))

Ray runs the receiving side of all transfers of an actor on one thread (`_ray_system`), so a hung source would stop all
others. Here that thread only delivers a ticket, `RemoteHandoff`; the pull happens on the thread of the method that was
given it. Whatever fails is raised there, and reaches whoever awaits that method as the project's own errors.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import ray
from ray._private.worker import global_worker
from ray.experimental import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
    register_tensor_transport,
)
from torch import Tensor

from deployments.errors import TransferError
from deployments.kv_transfer.base import Arrivals, Handoff, TransferConfig, TransferStats
from deployments.kv_transfer.endpoint import endpoint
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.link import CONTROL_GROUP
from deployments.kv_transfer.local import Arena
from deployments.kv_transfer.process import actor_id
from deployments.kv_transfer.receiver import RemoteHandoff

TRANSPORT_NAME = "KVRELAY"
EXPORT_GROUP = "export"
RECEIVE_GROUP = "kv"
TIER_GROUP = "tier"


# For `ray.remote`. The numbers are threads by kind of call: "kv" bounds the hand-offs that an engine awaits at once;
# each has a thread from its acceptance to its end. What is given to the tier shares one buffer.
ENGINE_ACTOR_OPTIONS: dict[str, Any] = {
    "enable_tensor_transport": True,
    "concurrency_groups": {RECEIVE_GROUP: 32, CONTROL_GROUP: 1, EXPORT_GROUP: 4, TIER_GROUP: 1, "ctl": 8, "stream": 2},
}


def engine_actor_options(num_handoffs: int) -> dict[str, Any]:
    """Likewise, of an engine that awaits so many hand-offs at once."""
    groups = ENGINE_ACTOR_OPTIONS["concurrency_groups"] | {RECEIVE_GROUP: num_handoffs}
    return ENGINE_ACTOR_OPTIONS | {"concurrency_groups": groups}


Self = TypeVar("Self")
Header = TypeVar("Header")
Result = TypeVar("Result")
P = ParamSpec("P")


def configure(
    layout: KVLayout, device: str = "cpu", config: TransferConfig | None = None, arena: Arena | None = None
) -> None:
    """Say what this process's KV is. An engine does so before it exports or receives.

    Args:
        layout: of the engine's KV.
        device: `cpu` (gloo) or `cuda` (NCCL), where its chunks are and where it wants those of others.
        config: bounds of the waits; None: the defaults.
        arena: where its chunks are, as far as there is room, for engines of the same machine to read; None: nowhere.
    """
    _make_manager()
    endpoint.configure(layout, device, config or TransferConfig(), arena)


def stats() -> TransferStats:
    """Counters of this process."""
    return endpoint.stats()


def register() -> None:
    """Make the transport known to this process's Ray. Idempotent; importing an engine actor's class does it too.

    A process that owns references must have done so before it makes or meets the first engine actor.
    """
    # Raised if it is registered; Ray itself may have been first, on behalf of the engine's creator.
    with suppress(ValueError):
        register_tensor_transport(TRANSPORT_NAME, ["cpu", "cuda"], KvTransport, Tensor)
    _make_manager()


def _make_manager() -> None:
    """Have Ray make its manager of transfers, before there are threads.

    Else it does so when one is first asked for, without a lock: two threads that are first at once get one each, and a
    chunk that is put into the one is awaited in the other for a minute (Ray 2.60, `Worker.rdt_manager`).
    """
    assert global_worker.rdt_manager is not None


def exports_kv(method: Callable[P, Handoff]) -> Callable[P, Tensor]:
    """Mark an actor's method that gives a hand-off away; see `Handoff`. Its chunks are not copied."""
    register()

    @functools.wraps(method)
    def export(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return _ticket_of(method(*args, **kwargs))

    # On the method itself, see `receives_kv`.
    mark: Any = ray.method(tensor_transport=TRANSPORT_NAME, concurrency_group=EXPORT_GROUP)
    mark(method)
    return export


def receives_kv(
    method: Callable[[Self, Header, Arrivals], Result],
) -> Callable[[Self, Header, Tensor], Result]:
    """Mark an actor's method that takes a hand-off as its second argument, and goes through all that comes of it.

    What comes may be the source's own memory: whoever reads it must be done, on a GPU too, when the method returns.

    If it cannot be brought, the method sees `TransferError` or `LayoutMismatchError`, and so does whoever awaits it.
    """

    @functools.wraps(method)
    def receive(self: Self, header: Header, handoff: Tensor | RemoteHandoff) -> Result:
        # Ray pickles this closure with the actor's class: it may name module-level functions, but no state.
        with _arrivals_of(handoff) as arrivals:
            return method(self, header, arrivals)

    # On the method itself: Ray unwraps before it looks for the mark (actor.py, `inspect.unwrap`).
    mark: Any = ray.method(concurrency_group=RECEIVE_GROUP)
    mark(method)
    return receive


@contextmanager
def _arrivals_of(handoff: Tensor | RemoteHandoff) -> Iterator[Arrivals]:
    if not isinstance(handoff, RemoteHandoff):
        raise TransferError("an engine hands nothing over to itself")
    pull = endpoint.pull(handoff)
    try:
        yield pull
    finally:
        pull.close()


# What this process has given away, by the tensor that stands for it, as long as that lives.
_given: dict[int, Handoff] = {}


def _ticket_of(handoff: Handoff) -> Tensor:
    ticket = endpoint.ticket()
    _given[id(ticket)] = handoff
    weakref.finalize(ticket, _given.pop, id(ticket)).atexit = False
    return ticket


@dataclass
class _HandoffMetadata(TensorTransportMetadata):
    """Travels with the reference: through its owner, to whoever receives the hand-off."""

    handoff: RemoteHandoff | None = None


class KvTransport(TensorTransportManager):
    """To Ray a one-sided transport, whose receiver gets a `RemoteHandoff` in place of each tensor.

    Its methods are called under locks and on threads that Ray shares among all transfers: none may wait.
    """

    def tensor_transport_backend(self) -> str:
        return TRANSPORT_NAME

    @staticmethod
    def is_one_sided() -> bool:
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Else Ray kills both actors when a transfer fails."""
        return True

    def actor_has_tensor_transport(self, actor: object) -> bool:
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Tensor]) -> _HandoffMetadata:
        (ticket,) = rdt_object
        handoff = RemoteHandoff(
            object_id=obj_id,
            source=ray.get_runtime_context().current_actor,
            source_id=actor_id(),
            layout=endpoint.layout,
            device=ticket.device.type,
            place=endpoint.hold(obj_id, _given[id(ticket)]),
        )
        return _HandoffMetadata([(ticket.shape, ticket.dtype)], ticket.device.type, handoff)

    def get_communicator_metadata(
        self, src_actor: object, dst_actor: object, backend: str | None = None
    ) -> CommunicatorMetadata:
        return CommunicatorMetadata()

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        assert isinstance(tensor_transport_metadata, _HandoffMetadata)
        return [tensor_transport_metadata.handoff]

    def send_multiple_tensors(
        self,
        tensors: list[Any],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        raise AssertionError("Ray has one-sided transports send nothing")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]) -> None:
        endpoint.let_go(obj_id)

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """Nothing: to Ray a transfer is over with the ticket, and the pull has its own bounds."""
