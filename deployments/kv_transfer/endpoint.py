"""What one process has of the hand-off: the chunks it produced, and its links to other engines in both directions.

The receiver drives. It opens a link, asks the source for one chunk, and receives it; the source's thread for that link
sends what it was asked for, in the order of the questions. A sender thus only ever waits for a receiver that receives
this very chunk next, so no cycle of waits can form, whoever hands what to whom. On one machine there is nothing to
send: the receiver reads the chunk where it lies. Called by `direct`; knows no Ray object references to chunks.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock, Thread
from time import monotonic
from typing import Any
from uuid import uuid4

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from deployments.errors import LayoutMismatchError, TransferError
from deployments.kv_groups import num_blocks_of
from deployments.kv_transfer.base import TransferConfig, TransferStats
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import build_group, host_store, join_store
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.line import Line, LineHost, call
from deployments.kv_transfer.link import Link, LinkLostError, Peer, Steps, Watchdog, call_engine
from deployments.kv_transfer.local import Arena, Neighbours, Place


@dataclass(frozen=True, slots=True)
class RemoteChunk:
    """A chunk in another engine's memory, and how to get it.

    Attributes:
        object_id: its name there.
        source: the engine that holds it.
        source_id: of that actor.
        layout: of that engine's KV.
        shape: of the chunk's tensor.
        device: `cpu` or `cuda`.
        place: where it can be read on the source's machine; None: nowhere, it must be sent.
    """

    object_id: str
    source: ActorHandle[Any]
    source_id: str
    layout: KVLayout
    shape: tuple[int, ...]
    device: str
    place: Place | None = None


_Address = tuple[str, int]
# What the source answers.
_SENDING, _GONE = "sending", "gone"


class Endpoint:
    """State of one process; safe to call from any thread."""

    def __init__(self) -> None:
        self._config = TransferConfig()
        self._layout: KVLayout | None = None
        self._device = "cpu"
        self._watchdog = Watchdog()
        self._lock = Lock()
        self._arena: Arena | None = None
        self._neighbours = Neighbours()
        self._held: dict[str, Tensor] = {}
        self._inbound: dict[str, Link] = {}
        self._outbound: dict[str, Link] = {}
        self._received_at = 0.0
        self._stats = TransferStats()

    @property
    def layout(self) -> KVLayout:
        assert self._layout is not None, "configure() was not called in this process"
        return self._layout

    def configure(self, layout: KVLayout, device: str, config: TransferConfig, arena: Arena | None) -> None:
        self._layout, self._device, self._config, self._arena = layout, device, config, arena

    def stats(self) -> TransferStats:
        with self._lock:
            return replace(
                self._stats,
                num_links=len(self._inbound) + len(self._outbound),
                num_neighbours=len(self._neighbours),
                num_held=len(self._held),
            )

    # The side of the source.

    def hold(self, object_id: str, tensor: Tensor) -> None:
        """Keep a chunk until `release`.

        Args:
            object_id: its name.
            tensor: complete, on a GPU too.

        Raises:
            ValueError: not a contiguous tensor of this engine's layout and device.
        """
        _check_chunk(tensor, self.layout, self._device)
        with self._lock:
            self._held[object_id] = tensor

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where engines of this machine find a chunk; None if it must be sent to them."""
        return self._arena.place_of(tensor) if self._arena is not None else None

    def release(self, object_id: str) -> None:
        """Drop a chunk; one that is being sent lives until that ends."""
        with self._lock:
            self._held.pop(object_id, None)

    def accept(self, name: str, receiver: ActorHandle[Any], receiver_id: str, line: _Address, store: _Address) -> None:
        """A receiver has opened a link and waits for us at its line and store; one that it had before is over."""
        with self._lock:
            previous = self._outbound.get(receiver_id)
            # Inside the lock, so that a link that fails at once is not forgotten before it is noted.
            open_channel = partial(self._join, name, receiver_id, line, store)
            link = Link(name, Peer(receiver), open_channel, self._config, self._forget_outbound)
            self._outbound[receiver_id] = link
        if previous is not None:
            previous.close("the receiver opened a new link")
        self._watchdog.watch(link, self._config.probe_interval_s)

    def _join(self, name: str, receiver_id: str, line_at: _Address, store_at: _Address) -> Channel:
        timeout_s = self._config.connect_timeout_s
        line = call(line_at, name, timeout_s)
        try:
            group = build_group(self._device, join_store(store_at, timeout_s), 1, _node_ip(), timeout_s)
        except BaseException:
            line.close()
            raise
        # A thread of its own, because the link's waits for jobs, and sends.
        Thread(target=self._answer, args=(name, receiver_id, line), name=f"kv-line-{name}", daemon=True).start()
        return Channel(group, line)

    def _answer(self, name: str, receiver_id: str, line: Line) -> None:
        """Have chunks sent as the receiver asks for them, until it closes the link."""
        with self._lock:
            link = self._outbound.get(receiver_id)
        if link is None or link.name != name:
            return
        try:
            while (object_id := line.hear()) is not None:
                line.say(_SENDING if self._push(link, object_id) else _GONE)
        except (OSError, TransferError):
            pass  # the receiver is gone, or does not live up to its own question
        link.close("the receiver closed the link")

    def _push(self, link: Link, object_id: str) -> bool:
        """Hand a chunk to the link's thread; False: it is gone. Never blocks."""
        with self._lock:
            held = self._held.get(object_id)
        if held is None:
            return False
        link.submit(partial(self._send, held))
        return True

    def _send(self, tensor: Tensor, channel: Channel) -> Steps:
        try:
            wait = channel.group.start_send(tensor)
            yield
            wait(self._config.transfer_timeout_s)
        except Exception:
            self._count(num_failed=1)
            raise
        self._count(num_sent=1)
        return None

    def _forget_outbound(self, link: Link) -> None:
        with self._lock:
            _remove(self._outbound, link)

    # The side of the receiver.

    def pull(self, chunk: RemoteChunk) -> Tensor:
        """Bring a chunk here, or into reach; blocks until it is complete.

        The caller keeps a reference to the chunk for as long as it uses the tensor: it may be the source's own memory.

        Raises:
            LayoutMismatchError: the source's KV is of another kind; nothing was sent.
            TransferError: the source died, hangs, or no longer has the chunk. The same chunk may be pulled again.
        """
        self.layout.check_compatible(chunk.layout)
        if chunk.device != self._device:
            raise LayoutMismatchError(
                f"engines disagree on the device of KV: ours {self._device}, theirs {chunk.device}"
            )
        if chunk.place is not None and (tensor := self._view(chunk, chunk.place)) is not None:
            return tensor
        try:
            try:
                return self._pull_once(chunk)
            except LinkLostError:
                # The source closed its end while nothing was under way, or was restarted.
                return self._pull_once(chunk)
        except TransferError as error:
            self._count(num_failed=1)
            # A new exception: the link's other jobs may hold the old one.
            raise TransferError(f"chunk from engine {chunk.source_id}: {error}") from None

    def _view(self, chunk: RemoteChunk, place: Place) -> Tensor | None:
        tensor = self._neighbours.view(place, chunk.shape, getattr(torch, chunk.layout.form.element))
        if tensor is not None:
            self._count(num_received=1, num_received_bytes=tensor.nbytes, num_read_in_place=1)
        return tensor

    def _pull_once(self, chunk: RemoteChunk) -> Tensor:
        link = self._link_to(chunk)
        tensor = link.submit(partial(self._receive, chunk)).result()
        assert tensor is not None
        return tensor

    def _link_to(self, chunk: RemoteChunk) -> Link:
        name = uuid4().hex
        with self._lock:
            link = self._inbound.get(chunk.source_id)
            if link is not None:
                return link
            open_channel = partial(self._invite, name, chunk)
            link = Link(name, Peer(chunk.source), open_channel, self._config, self._forget_inbound)
            self._inbound[chunk.source_id] = link
        self._watchdog.watch(link, self._config.probe_interval_s)
        return link

    def _invite(self, name: str, chunk: RemoteChunk) -> Channel:
        """Open a line and a store for this link alone, tell the source where they are, and wait for it there."""
        timeout_s, node_ip = self._config.connect_timeout_s, _node_ip()
        store, store_at = host_store(node_ip, timeout_s)
        receiver = ray.get_runtime_context().current_actor
        with LineHost(node_ip, name) as host:
            invitation = call_engine(chunk.source, _accept, name, receiver, actor_id(), host.address, store_at)
            ray.get(invitation, timeout=timeout_s)
            line = host.wait(timeout_s)
        try:
            return Channel(build_group(self._device, store, 0, node_ip, timeout_s), line)
        except BaseException:
            line.close()
            raise

    def _receive(self, chunk: RemoteChunk, channel: Channel) -> Steps:
        started = monotonic()
        with suppress(OSError):
            channel.line.say(chunk.object_id)
        tensor = torch.empty(chunk.shape, dtype=getattr(torch, chunk.layout.form.element), device=chunk.device)
        yield
        reply = channel.line.hear(self._config.connect_timeout_s)
        if reply is None:
            raise LinkLostError("the source closed the link")
        if reply == _GONE:
            raise TransferError("the source no longer has it")
        wait = channel.group.start_recv(tensor)
        yield
        wait(self._config.transfer_timeout_s)
        self._count_received(tensor.nbytes, started)
        return tensor

    def _count_received(self, nbytes: int, started: float) -> None:
        """Time in which several chunks were under way counts once."""
        with self._lock:
            ended = monotonic()
            since, self._received_at = max(started, self._received_at), ended
        self._count(num_received=1, num_received_bytes=nbytes, receive_s=ended - since)

    def _forget_inbound(self, link: Link) -> None:
        with self._lock:
            _remove(self._inbound, link)

    def _count(self, **increments: float) -> None:
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + by for name, by in increments.items()}
            )


# One for the process, because the function below is run in it by other engines.
endpoint = Endpoint()


def _accept(
    _engine: object, name: str, receiver: ActorHandle[Any], receiver_id: str, line: _Address, store: _Address
) -> None:
    endpoint.accept(name, receiver, receiver_id, line, store)


def actor_id() -> str:
    """Of the engine that this process is."""
    found = ray.get_runtime_context().get_actor_id()
    assert found is not None, "KV moves between actors only"
    return found


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _remove(links: dict[str, Link], link: Link) -> None:
    """Forget this link, but not one that has taken its place since."""
    for peer_id, other in list(links.items()):
        if other is link:
            del links[peer_id]


def _check_chunk(tensor: Tensor, layout: KVLayout, device: str) -> None:
    shape = layout.chunk_shape(num_blocks_of(tensor.shape))
    if (
        tuple(tensor.shape) != shape
        or tensor.dtype != getattr(torch, layout.form.element)
        or tensor.device.type != device
    ):
        raise ValueError(
            f"a chunk of KV has shape {shape}, {layout.dtype} on {device};"
            f" got {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"a chunk of KV must be contiguous, got strides {tensor.stride()}")
