"""Brings hand-offs of other engines here, or into reach. The receiver drives: it opens the links, and asks."""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from time import monotonic, sleep
from uuid import uuid4

import ray
import torch
from torch import Tensor

from deployments.errors import LayoutMismatchError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, build_group, host_store
from deployments.kv_transfer.inquiries import Inquiries
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.line import LineHost
from deployments.kv_transfer.link import Link, Peer, RemoteEngine, Steps, Watchdog, call_engine, until_over
from deployments.kv_transfer.local import Neighbours, Place
from deployments.kv_transfer.notes import Note, decode
from deployments.kv_transfer.process import Counters, actor_id, node_ip
from deployments.kv_transfer.source import Invitation, forget

# Chunks that were sent and are not in the pool yet, or are on their way: what their memory is bounded by.
_MAX_RECEIVED = 8
_ROOM_POLL_S = 0.0002


@dataclass(frozen=True, slots=True)
class RemoteHandoff:
    """What another engine hands over, and how to get it.

    Attributes:
        object_id: its name there.
        source: the engine that holds it.
        source_id: of that actor.
        layout: of that engine's KV.
        device: `cpu` or `cuda`.
        place: where chunks can be read on the source's machine, if there is room; None: nowhere, they must be sent.
    """

    object_id: str
    source: RemoteEngine
    source_id: str
    layout: KVLayout
    device: str
    place: Place | None = None

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.layout.form.element)
        return found


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
    """See the module; `Pull` asks it. Safe from any thread.

    Args:
        watchdog: of all links of the process.
        counters: of the process.
        accept: what a source's process is to run with the invitation.

    Attributes:
        counters: of the process.
    """

    def __init__(self, watchdog: Watchdog, counters: Counters, accept: Callable[[object, Invitation], None]) -> None:
        self._accept = accept
        self._watchdog = watchdog
        self.counters = counters
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

    def reads(self, handoff: RemoteHandoff, layout: KVLayout, device: str) -> bool:
        """Whether its chunks can be read where they are; else they must be sent.

        Raises:
            LayoutMismatchError: the source's KV is of another kind.
        """
        layout.check_compatible(handoff.layout)
        if handoff.device != device:
            raise LayoutMismatchError(f"engines disagree on the device of KV: ours {device}, theirs {handoff.device}")
        return handoff.place is not None and self._neighbours.reaches(handoff.place)

    def view(self, handoff: RemoteHandoff, note: Note) -> Tensor | None:
        """A whole chunk where it is; None: its process is gone."""
        assert handoff.place is not None and note.offset is not None
        shape = handoff.layout.chunk_shape(note.tensor_blocks)
        return self._neighbours.view(handoff.place.at(note.offset), shape, handoff.dtype)

    def inquiries_at(self, handoff: RemoteHandoff, config: TransferConfig, is_sent: bool) -> Inquiries:
        """What its source can be asked by, over a link that stands or is about to; whether it is to send anything."""
        name, key = uuid4().hex, (handoff.source_id, is_sent)
        with self._lock:
            if (known := self._inquiries.get(key)) is not None:
                return known
            inquiries = self._inquiries[key] = Inquiries()
            open_channel = partial(self._invite, name, handoff, is_sent, config.connect_timeout_s)
            link = Link(name, Peer(handoff.source), open_channel, config, self._forget, inquiries)
            self._links[key] = link
        self._watchdog.watch(link, config.probe_interval_s)
        return inquiries

    def receive(self, handoff: RemoteHandoff, text: str, group: Group, config: TransferConfig) -> Steps:
        """Receive a part of which the source has said this, as a job of the link."""
        note, all_layers = decode(text), handoff.layout.chunk_shape(0)[0]
        first, end = note.layers or (0, all_layers)
        deadline = monotonic() + config.transfer_timeout_s
        while not self._room.take(end - first, all_layers):
            if monotonic() > deadline:
                raise TimeoutError("the engine takes nothing into its pool")
            # Not for long at once: what gives room back may be what this very link has under way.
            sleep(_ROOM_POLL_S)
            yield False
        started = monotonic()
        tensor = group.allocate((end - first, *handoff.layout.chunk_shape(note.tensor_blocks)[1:]), handoff.dtype)
        weakref.finalize(tensor, self._room.give_back, end - first).atexit = False
        wait = group.start_recv(tensor)
        yield True
        yield from until_over(wait, config.transfer_timeout_s)
        self._count_received(tensor.nbytes, started)
        return tensor

    def _invite(self, name: str, handoff: RemoteHandoff, is_sent: bool, timeout_s: float) -> Channel:
        """Open a line for this link alone, and a store, tell the source where they are, and wait for it there."""
        host, group = node_ip(), None
        store, store_at = host_store(host, timeout_s) if is_sent else (None, None)
        receiver = ray.get_runtime_context().current_actor
        with LineHost(host, name) as line_host:
            invitation = Invitation(name, receiver, actor_id(), line_host.address, store_at)
            ray.get(call_engine(handoff.source, self._accept, invitation), timeout=timeout_s)
            line = line_host.wait(timeout_s)
        try:
            if store is not None:
                group = build_group(handoff.device, store, 0, host, timeout_s)
        except BaseException:
            line.close()
            raise
        return Channel(group, line)

    def _count_received(self, nbytes: int, started: float) -> None:
        """Time in which several chunks were on their way counts once."""
        with self._lock:
            ended = monotonic()
            since, self._received_at = max(started, self._received_at), ended
        self.counters.add(num_received_bytes=nbytes, receive_s=ended - since)

    def _forget(self, link: Link) -> None:
        with self._lock:
            for key in forget(self._links, link):
                del self._inquiries[key]
