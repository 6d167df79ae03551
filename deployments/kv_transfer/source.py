"""The chunks that this process produced for others, and its links to those that ask for them.

A chunk may be asked for before it is complete. The receiver hears of it when it is; what is to be sent is sent then, by
the link's thread. A sender thus only ever waits for a receiver that receives this very chunk next, so no cycle of waits
can form, whoever hands what to whom.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Lock, Thread

from torch import Tensor

from deployments.kv_groups import layers_of_parts
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, build_group, join_store
from deployments.kv_transfer.inquiries import Answers
from deployments.kv_transfer.line import Line, call
from deployments.kv_transfer.link import Job, Link, Peer, RemoteEngine, Steps, Watchdog, until_over
from deployments.kv_transfer.process import Counters, node_ip

Address = tuple[str, int]
_PART = "/"


@dataclass(frozen=True, slots=True)
class Invitation:
    """To a link that a receiver has opened.

    Attributes:
        name: of the link; also the secret of its line.
        receiver: who waits.
        receiver_id: of that actor.
        line: where its line begins.
        store: where its group meets; None: the receiver reads chunks where they are.
    """

    name: str
    receiver: RemoteEngine
    receiver_id: str
    line: Address
    store: Address | None


@dataclass(frozen=True, slots=True)
class _Held:
    tensor: Tensor
    notes: "tuple[Future[str], ...]"
    cuts: tuple[int, ...]

    def part(self, number: int | None) -> Tensor:
        if number is None:
            return self.tensor
        first, end = layers_of_parts(self.cuts, len(self.tensor))[number]
        return self.tensor[first:end]


def name_of_part(object_id: str, number: int) -> str:
    """What a part of a chunk is asked for by; the chunk's own name asks for it whole."""
    return f"{object_id}{_PART}{number}"


class Source:
    """See the module. Safe from any thread.

    Args:
        watchdog: of all links of the process.
        counters: of the process.
    """

    def __init__(self, watchdog: Watchdog, counters: Counters) -> None:
        self._watchdog = watchdog
        self._counters = counters
        self._lock = Lock()
        self._held: dict[str, _Held] = {}
        self._links: dict[tuple[str, bool], Link] = {}

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_links(self) -> int:
        return len(self._links)

    def hold(self, object_id: str, tensor: Tensor, notes: "tuple[Future[str], ...]", cuts: tuple[int, ...]) -> None:
        """Keep a chunk until `release`.

        Args:
            object_id: its name.
            tensor: its memory.
            notes: of its parts; each is done when that and those before are complete.
            cuts: layers at which it is cut into parts.
        """
        with self._lock:
            self._held[object_id] = _Held(tensor, notes, cuts)

    def release(self, object_id: str) -> None:
        """Drop a chunk; one that is being sent lives until that ends."""
        with self._lock:
            self._held.pop(object_id, None)

    def note_of(self, object_id: str) -> "Future[str] | None":
        """See `Chunks`."""
        held, number = self._find(object_id)
        return None if held is None else held.notes[-1 if number is None else number]

    def sending_of(self, object_id: str) -> Job | None:
        """See `Chunks`."""
        held, number = self._find(object_id)
        if held is None:
            return None
        return partial(self._send, held.part(number), number is None or number == len(held.cuts))

    def _find(self, name: str) -> tuple[_Held | None, int | None]:
        """A chunk, and which part of it is meant; None: the whole."""
        object_id, _, number = name.partition(_PART)
        with self._lock:
            return self._held.get(object_id), int(number) if number else None

    def accept(self, invitation: Invitation, device: str, config: TransferConfig) -> None:
        """A receiver waits for us; a link of that kind that it had before is over."""
        key = invitation.receiver_id, invitation.store is not None
        with self._lock:
            previous = self._links.get(key)
            # Inside the lock, so that a link that fails at once is not forgotten before it is noted.
            open_channel = partial(self._join, invitation, device, config.connect_timeout_s)
            link = Link(invitation.name, Peer(invitation.receiver), open_channel, config, self._forget)
            self._links[key] = link
        if previous is not None:
            previous.close("the receiver opened a new link")
        self._watchdog.watch(link, config.probe_interval_s)

    def _join(self, invitation: Invitation, device: str, timeout_s: float) -> Channel:
        line, group = call(invitation.line, invitation.name, timeout_s), None
        try:
            if invitation.store is not None:
                group = build_group(device, join_store(invitation.store, timeout_s), 1, node_ip(), timeout_s)
        except BaseException:
            line.close()
            raise
        # A thread of its own, because the link's waits for jobs, and sends.
        Thread(target=self._answer, args=(invitation, line), name=f"kv-line-{invitation.name}", daemon=True).start()
        return Channel(group, line)

    def _answer(self, invitation: Invitation, line: Line) -> None:
        with self._lock:
            link = self._links.get((invitation.receiver_id, invitation.store is not None))
        if link is not None and link.name == invitation.name:
            Answers(link, line, self).run()

    def _send(self, tensor: Tensor, ends_chunk: bool, group: Group, config: TransferConfig) -> Steps:
        try:
            wait = group.start_send(tensor)
            yield True
            yield from until_over(wait, config.transfer_timeout_s)
        except Exception:
            self._counters.add(num_failed=1)
            raise
        self._counters.add(num_sent=int(ends_chunk))
        return None

    def _forget(self, link: Link) -> None:
        with self._lock:
            forget(self._links, link)


def forget(links: dict[tuple[str, bool], Link], link: Link) -> list[tuple[str, bool]]:
    """Drop this link, but not one that has taken its place since; where it was."""
    keys = [key for key, other in links.items() if other is link]
    for key in keys:
        del links[key]
    return keys
