"""KV as Ray Direct Transport objects. The one file of the project that knows that part of Ray.

A method under `exports_kv` returns a chunk's tensor; Ray leaves the tensor where it is and hands out a reference. As a
positional argument of a method under `receives_kv` it arrives there as the tensor. The chunk is freed at its source
when the last reference is gone. The reference may be passed on before the chunk is computed: what Ray does to it takes
longer than a step, and only the bytes wait for them.

    @ray.remote(**ENGINE_ACTOR_OPTIONS)
    class EngineActor:
        @exports_kv
        def take_chunk(self, request_id: str, index: int) -> Export: ...
        @receives_kv
        def receive_kv(self, header: ChunkReady, arrivals: Iterator[Arrival]) -> None: ...

    ack = decode.receive_kv.remote(header, prefill.take_chunk.remote(request_id, index))

Ray runs the receiving side of all transfers of an actor on one thread (`_ray_system`), so a hung source would stop all
others. Here that thread only delivers a ticket, `RemoteChunk`; the pull happens on the thread of the method that was
given it. Whatever fails is raised there, and reaches whoever awaits that method as the project's own errors.

One reference may stand for a chunk in parts, see `Export.cuts`: it is passed on once, and the parts come as they are
complete.
"""

import base64
import functools
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import msgspec
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
from deployments.kv_transfer.base import Arrival, Export, TransferConfig, TransferStats
from deployments.kv_transfer.endpoint import endpoint
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.link import CONTROL_GROUP
from deployments.kv_transfer.local import Arena
from deployments.kv_transfer.process import actor_id
from deployments.kv_transfer.receiver import RemoteChunk
from deployments.messages import DrawnToken

TRANSPORT_NAME = "KVRELAY"
EXPORT_GROUP = "export"
RECEIVE_GROUP = "kv"
TIER_GROUP = "tier"


# For `ray.remote`. The numbers are threads by kind of call: "kv" bounds the chunks that an engine awaits or receives at
# once: up to two steps of each source. What is given to the tier shares one buffer.
ENGINE_ACTOR_OPTIONS: dict[str, Any] = {
    "enable_tensor_transport": True,
    "concurrency_groups": {RECEIVE_GROUP: 32, CONTROL_GROUP: 1, EXPORT_GROUP: 4, TIER_GROUP: 1, "ctl": 8, "stream": 2},
}

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


def exports_kv(method: Callable[P, Export]) -> Callable[P, Tensor]:
    """Mark an actor's method that returns one chunk: contiguous, of the configured layout and device.

    It is not copied: once it is complete it must not be written to until the reference is gone.
    """
    register()

    @functools.wraps(method)
    def export(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        found = method(*args, **kwargs)
        _expect_export(found)
        return found.tensor

    # On the method itself, see `receives_kv`.
    mark: Any = ray.method(tensor_transport=TRANSPORT_NAME, concurrency_group=EXPORT_GROUP)
    mark(method)
    return export


def receives_kv(
    method: Callable[[Self, Header, Iterator[Arrival]], Result],
) -> Callable[[Self, Header, Tensor], Result]:
    """Mark an actor's method that takes a chunk as its second argument.

    It gets the chunk once it is complete and there, or each part of it likewise, one after the other; it goes through
    them all. They may be the source's own memory: whoever reads it must be done, on a GPU too, when the method returns.

    If one cannot be brought, the method sees `TransferError` or `LayoutMismatchError`, and so does whoever awaits it.
    """

    @functools.wraps(method)
    def receive(self: Self, header: Header, chunk: Tensor | RemoteChunk) -> Result:
        # Ray pickles this closure with the actor's class: it may name module-level functions, but no state.
        return method(self, header, _bring(chunk))

    # On the method itself: Ray unwraps before it looks for the mark (actor.py, `inspect.unwrap`).
    mark: Any = ray.method(concurrency_group=RECEIVE_GROUP)
    mark(method)
    return receive


def _bring(chunk: Tensor | RemoteChunk) -> Iterator[Arrival]:
    """Pull the chunk; one that this very engine exported arrives as it is."""
    if isinstance(chunk, RemoteChunk):
        for tensor, note, complete_s, layers, is_lent in endpoint.pull(chunk):
            yield Arrival(tensor, _decode(note), complete_s, layers if chunk.cuts else None, is_lent)
            del tensor
        return
    try:
        token = _decode(_exported[id(chunk)].notes[-1].result())
    except CancelledError:
        raise TransferError("the chunk is gone") from None
    yield Arrival(chunk, token, time.monotonic(), is_lent=True)


class _Exported(NamedTuple):
    """What comes with the parts of a chunk, and where it is cut into them."""

    notes: "tuple[Future[str], ...]"
    cuts: tuple[int, ...]


# Of the chunks that this process has exported, by tensor, as long as that lives.
_exported: dict[int, _Exported] = {}


def _expect_export(export: Export) -> None:
    notes = tuple(map(_note_of, (*export.earlier, export.completion)))
    _exported[id(export.tensor)] = _Exported(notes, export.cuts)
    weakref.finalize(export.tensor, _exported.pop, id(export.tensor)).atexit = False


def _note_of(completion: "Future[DrawnToken | None]") -> "Future[str]":
    note: Future[str] = Future()

    def finish(done: "Future[DrawnToken | None]") -> None:
        if done.cancelled():
            note.cancel()
        else:
            note.set_result(_encode(done.result()))

    completion.add_done_callback(finish)
    return note


def _encode(token: DrawnToken | None) -> str:
    # No JSON: it knows no infinite logprobs. No pickle: whoever reaches a line's port shall not run code.
    return base64.b64encode(msgspec.msgpack.encode(token)).decode()


def _decode(note: str) -> DrawnToken | None:
    return msgspec.msgpack.decode(base64.b64decode(note), type=DrawnToken | None)


@dataclass
class _ChunkMetadata(TensorTransportMetadata):
    """Travels with the reference: through its owner, to whoever receives the chunk."""

    chunk: RemoteChunk | None = None


class KvTransport(TensorTransportManager):
    """To Ray a one-sided transport, whose receiver gets a `RemoteChunk` in place of each tensor.

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

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Tensor]) -> _ChunkMetadata:
        if len(rdt_object) != 1:
            raise ValueError(f"a method that exports KV returns one tensor, got {len(rdt_object)}")
        (tensor,) = rdt_object
        exported = _exported[id(tensor)]
        note = exported.notes[-1]
        endpoint.hold(obj_id, tensor, *exported)
        chunk = RemoteChunk(
            object_id=obj_id,
            source=ray.get_runtime_context().current_actor,
            source_id=actor_id(),
            layout=endpoint.layout,
            shape=tuple(tensor.shape),
            device=tensor.device.type,
            place=endpoint.place_of(tensor),
            note=note.result() if note.done() and not note.cancelled() else None,
            cuts=exported.cuts,
        )
        return _ChunkMetadata([(tensor.shape, tensor.dtype)], tensor.device.type, chunk)

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
        assert isinstance(tensor_transport_metadata, _ChunkMetadata)
        return [tensor_transport_metadata.chunk]

    def send_multiple_tensors(
        self,
        tensors: list[Any],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        raise AssertionError("Ray has one-sided transports send nothing")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]) -> None:
        endpoint.release(obj_id)

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """Nothing: to Ray a transfer is over with the ticket, and the pull has its own bounds."""
