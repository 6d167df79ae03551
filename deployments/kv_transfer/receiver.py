"""Brings chunks of other engines here, or into reach. The receiver drives: it opens the links, and asks."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock, Semaphore
from time import monotonic
from uuid import uuid4

import ray
import torch
from torch import Tensor

from deployments.errors import LayoutMismatchError, TransferError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, build_group, host_store
from deployments.kv_transfer.inquiries import Inquiries
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.line import LineHost
from deployments.kv_transfer.link import (
    Link,
    LinkLostError,
    Peer,
    RemoteEngine,
    Steps,
    Watchdog,
    call_engine,
    until_over,
)
from deployments.kv_transfer.local import Neighbours, Place
from deployments.kv_transfer.process import Counters, actor_id, node_ip
from deployments.kv_transfer.source import Invitation, forget

# Chunks that were sent and are not in the pool yet, or are on their way: what their memory is bounded by.
_MAX_RECEIVED = 8
_ROOM_POLL_S = 0.001


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
        note: what comes with it; None: it was not complete yet, and who asks is told.
    """

    object_id: str
    source: RemoteEngine
    source_id: str
    layout: KVLayout
    shape: tuple[int, ...]
    device: str
    place: Place | None = None
    note: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.layout.form.element)
        return found


class Receiver:
    """See the module. Safe from any thread.

    Args:
        watchdog: of all links of the process.
        counters: of the process.
        accept: what a source's process is to run with the invitation.
    """

    def __init__(self, watchdog: Watchdog, counters: Counters, accept: Callable[[object, Invitation], None]) -> None:
        self._accept = accept
        self._watchdog = watchdog
        self._counters = counters
        self._lock = Lock()
        self._neighbours = Neighbours()
        # By the source, and whether it sends.
        self._links: dict[tuple[str, bool], Link] = {}
        self._inquiries: dict[tuple[str, bool], Inquiries] = {}
        self._received_at = 0.0
        self._room = Semaphore(_MAX_RECEIVED)

    @property
    def num_links(self) -> int:
        return len(self._links)

    @property
    def num_neighbours(self) -> int:
        return len(self._neighbours)

    def pull(
        self, chunk: RemoteChunk, layout: KVLayout, device: str, config: TransferConfig
    ) -> tuple[Tensor, str, float]:
        """Bring a chunk here, or into reach, with its note and when it was complete; blocks until it is.

        The caller keeps a reference to the chunk for as long as it uses the tensor: it may be the source's own memory.

        Raises:
            LayoutMismatchError: the source's KV is of another kind; nothing was sent.
            TransferError: the source died, hangs, or no longer has the chunk. The same chunk may be pulled again.
        """
        layout.check_compatible(chunk.layout)
        if chunk.device != device:
            raise LayoutMismatchError(f"engines disagree on the device of KV: ours {device}, theirs {chunk.device}")
        view = None if chunk.place is None else self._neighbours.view(chunk.place, chunk.shape, chunk.dtype)
        if view is None:
            tensor, note, complete_s = self._ask(chunk, config, is_sent=True)
            assert tensor is not None
            return tensor, note, complete_s
        if chunk.note is None:
            _, note, complete_s = self._ask(chunk, config, is_sent=False)
        else:
            note, complete_s = chunk.note, monotonic()
        self._counters.add(num_received=1, num_received_bytes=view.nbytes, num_read_in_place=1)
        return view, note, complete_s

    def _ask(self, chunk: RemoteChunk, config: TransferConfig, is_sent: bool) -> tuple[Tensor | None, str, float]:
        try:
            try:
                return self._ask_once(chunk, config, is_sent)
            except LinkLostError:
                # The source closed its end while nothing was under way, or was restarted.
                return self._ask_once(chunk, config, is_sent)
        except TransferError as error:
            self._counters.add(num_failed=1)
            # A new exception: the link's other jobs may hold the old one.
            raise TransferError(f"chunk from engine {chunk.source_id}: {error}") from None

    def _ask_once(self, chunk: RemoteChunk, config: TransferConfig, is_sent: bool) -> tuple[Tensor | None, str, float]:
        inquiries = self._inquiries_at(chunk, config, is_sent)
        return inquiries.ask(chunk.object_id, partial(self._receive, chunk) if is_sent else None).result()

    def _inquiries_at(self, chunk: RemoteChunk, config: TransferConfig, is_sent: bool) -> Inquiries:
        name, key = uuid4().hex, (chunk.source_id, is_sent)
        with self._lock:
            if (known := self._inquiries.get(key)) is not None:
                return known
            inquiries = self._inquiries[key] = Inquiries()
            open_channel = partial(self._invite, name, chunk, is_sent, config.connect_timeout_s)
            link = Link(name, Peer(chunk.source), open_channel, config, self._forget, inquiries)
            self._links[key] = link
        self._watchdog.watch(link, config.probe_interval_s)
        return inquiries

    def _invite(self, name: str, chunk: RemoteChunk, is_sent: bool, timeout_s: float) -> Channel:
        """Open a line for this link alone, and a store, tell the source where they are, and wait for it there."""
        host, group = node_ip(), None
        store, store_at = host_store(host, timeout_s) if is_sent else (None, None)
        receiver = ray.get_runtime_context().current_actor
        with LineHost(host, name) as line_host:
            invitation = Invitation(name, receiver, actor_id(), line_host.address, store_at)
            ray.get(call_engine(chunk.source, self._accept, invitation), timeout=timeout_s)
            line = line_host.wait(timeout_s)
        try:
            if store is not None:
                group = build_group(chunk.device, store, 0, host, timeout_s)
        except BaseException:
            line.close()
            raise
        return Channel(group, line)

    def _receive(self, chunk: RemoteChunk, group: Group, config: TransferConfig) -> Steps:
        deadline = monotonic() + config.transfer_timeout_s
        # Not for long at once: what gives room back may be what this very link has under way.
        while not self._room.acquire(timeout=_ROOM_POLL_S):
            if monotonic() > deadline:
                raise TimeoutError("the engine takes nothing into its pool")
            yield False
        started = monotonic()
        tensor = group.allocate(chunk.shape, chunk.dtype)
        weakref.finalize(tensor, self._room.release).atexit = False
        wait = group.start_recv(tensor)
        yield True
        yield from until_over(wait, config.transfer_timeout_s)
        self._count_received(tensor.nbytes, started)
        return tensor

    def _count_received(self, nbytes: int, started: float) -> None:
        """Time in which several chunks were on their way counts once."""
        with self._lock:
            ended = monotonic()
            since, self._received_at = max(started, self._received_at), ended
        self._counters.add(num_received=1, num_received_bytes=nbytes, receive_s=ended - since)

    def _forget(self, link: Link) -> None:
        with self._lock:
            for key in forget(self._links, link):
                del self._inquiries[key]
