"""Brings chunks of other engines here, or into reach. The receiver drives: it opens the links, and asks."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Lock
from time import monotonic, sleep
from typing import NamedTuple
from uuid import uuid4

import ray
import torch
from torch import Tensor

from deployments.errors import LayoutMismatchError, TransferError
from deployments.kv_groups import layers_of_parts
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, build_group, host_store
from deployments.kv_transfer.inquiries import Arrival, Inquiries
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
from deployments.kv_transfer.source import Invitation, forget, name_of_part

# Chunks that were sent and are not in the pool yet, or are on their way: what their memory is bounded by.
_MAX_RECEIVED = 8
_ROOM_POLL_S = 0.0002


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
        cuts: layers at which it is cut into parts, which are complete one after the other; none: it comes whole.
    """

    object_id: str
    source: RemoteEngine
    source_id: str
    layout: KVLayout
    shape: tuple[int, ...]
    device: str
    place: Place | None = None
    note: str | None = None
    cuts: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.layout.form.element)
        return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """A chunk, or a part of one, that the source is asked for.

    Attributes:
        chunk: it.
        name: by which it is asked for.
        num_layers: of it.
        is_sent: it comes over the link; else it is read where it is.
    """

    chunk: RemoteChunk
    name: str
    num_layers: int
    is_sent: bool


class Pulled(NamedTuple):
    """A chunk that was brought here, or into reach, or a part of one.

    Attributes:
        tensor: it.
        note: what came with it.
        complete_s: monotonic time when this process heard that it is complete.
        layers: the first one whose KV it is, and the one behind the last.
        is_lent: it is the source's own memory; the caller keeps a reference to the chunk while it is used.
    """

    tensor: Tensor
    note: str
    complete_s: float
    layers: tuple[int, int]
    is_lent: bool


class _Room:
    """Memory for `_MAX_RECEIVED` chunks; a part of one takes its share. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._used = 0
        # Not under the lock: a tensor may be dropped anywhere, also by this very thread amid `take`.
        self._freed: deque[int] = deque()

    def take(self, num_layers: int, of_layers: int) -> bool:
        """Take room for some layers of a chunk; False: there is none now."""
        with self._lock:
            while self._freed:
                self._used -= self._freed.popleft()
            fits = self._used + num_layers <= _MAX_RECEIVED * of_layers
            self._used += num_layers if fits else 0
            return fits

    def give_back(self, num_layers: int) -> None:
        self._freed.append(num_layers)


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
        self._room = _Room()

    @property
    def num_links(self) -> int:
        return len(self._links)

    @property
    def num_neighbours(self) -> int:
        return len(self._neighbours)

    def pull(self, chunk: RemoteChunk, layout: KVLayout, device: str, config: TransferConfig) -> Iterator[Pulled]:
        """Bring a chunk here, or into reach: whole, or part by part as they are complete; each wait blocks.

        All parts are asked for at once, so that nothing but the source's word is on the way of any.

        Raises:
            LayoutMismatchError: the source's KV is of another kind; nothing was sent.
            TransferError: the source died, hangs, or no longer has the chunk. The same chunk may be pulled again.
        """
        layout.check_compatible(chunk.layout)
        if chunk.device != device:
            raise LayoutMismatchError(f"engines disagree on the device of KV: ours {device}, theirs {chunk.device}")
        view = None if chunk.place is None else self._neighbours.view(chunk.place, chunk.shape, chunk.dtype)
        if view is not None and chunk.note is not None:
            self._counters.add(num_received=1, num_received_bytes=view.nbytes, num_read_in_place=1)
            yield Pulled(view, chunk.note, monotonic(), (0, len(view)), True)
            return
        parts = layers_of_parts(chunk.cuts, chunk.shape[0])
        names = [name_of_part(chunk.object_id, i) for i in range(len(parts))] if chunk.cuts else [chunk.object_id]
        asked = [
            _Asked(chunk, name, end - first, view is None) for name, (first, end) in zip(names, parts, strict=True)
        ]
        arrivals = [self._ask(each, config) for each in asked]
        for each, layers in zip(asked, parts, strict=True):
            tensor, note, complete_s = self._await(each, arrivals.pop(0), config)
            if tensor is None:
                assert view is not None
                tensor = view[slice(*layers)]
            # A name of its own would keep it here while the next part is awaited.
            yield Pulled(tensor, note, complete_s, layers, view is not None)
            del tensor
        self._counters.add(num_received=1)
        if view is not None:
            self._counters.add(num_received_bytes=view.nbytes, num_read_in_place=1)

    def _ask(self, asked: "_Asked", config: TransferConfig) -> Arrival:
        receive = partial(self._receive, asked) if asked.is_sent else None
        return self._inquiries_at(asked.chunk, config, asked.is_sent).ask(asked.name, receive)

    def _await(self, asked: "_Asked", arrival: Arrival, config: TransferConfig) -> tuple[Tensor | None, str, float]:
        try:
            try:
                return arrival.result()
            except LinkLostError:
                # The source closed its end while nothing was under way, or was restarted.
                return self._ask(asked, config).result()
        except TransferError as error:
            self._counters.add(num_failed=1)
            # A new exception: the link's other jobs may hold the old one.
            raise TransferError(f"chunk from engine {asked.chunk.source_id}: {error}") from None

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

    def _receive(self, asked: "_Asked", group: Group, config: TransferConfig) -> Steps:
        deadline = monotonic() + config.transfer_timeout_s
        while not self._room.take(asked.num_layers, asked.chunk.shape[0]):
            if monotonic() > deadline:
                raise TimeoutError("the engine takes nothing into its pool")
            # Not for long at once: what gives room back may be what this very link has under way.
            sleep(_ROOM_POLL_S)
            yield False
        started = monotonic()
        tensor = group.allocate((asked.num_layers, *asked.chunk.shape[1:]), asked.chunk.dtype)
        weakref.finalize(tensor, self._room.give_back, asked.num_layers).atexit = False
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
        self._counters.add(num_received_bytes=nbytes, receive_s=ended - since)

    def _forget(self, link: Link) -> None:
        with self._lock:
            for key in forget(self._links, link):
                del self._inquiries[key]
