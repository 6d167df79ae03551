"""The hand-offs that this process gives away, and its links to those that ask for them.

A hand-off may be asked for before anything of it is computed. The receiver hears of each part when that is complete;
what is to be sent is sent then, by the link's thread. A sender thus only ever waits for a receiver that receives this
very part next, so no cycle of waits can form, whoever hands what to whom.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock, Thread

from torch import Tensor

from deployments.engine.handoff.outgoing import Part, Told
from deployments.kv_transfer.base import Handoff, TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, build_group, join_store
from deployments.kv_transfer.inquiries import Answers
from deployments.kv_transfer.line import Line, call
from deployments.kv_transfer.link import Job, Link, Peer, RemoteEngine, Steps, Watchdog, until_over
from deployments.kv_transfer.notes import Note, encode
from deployments.kv_transfer.process import Counters, node_ip

Address = tuple[str, int]


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


class Source:
    """See the module. Safe from any thread.

    Args:
        watchdog: of all links of the process.
        counters: of the process.
        describe: what is said of a part; ValueError: it is no KV of this engine.
    """

    def __init__(self, watchdog: Watchdog, counters: Counters, describe: Callable[[Part], Note]) -> None:
        self._watchdog = watchdog
        self._counters = counters
        self._describe = describe
        self._lock = Lock()
        self._held: dict[str, Handoff] = {}
        self._links: dict[tuple[str, bool], Link] = {}

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_links(self) -> int:
        return len(self._links)

    def hold(self, object_id: str, handoff: Handoff) -> None:
        """Keep a hand-off for those that ask for it by this name, until `let_go`."""
        with self._lock:
            self._held[object_id] = handoff

    def let_go(self, object_id: str) -> None:
        """Drop a hand-off; what of it is being sent lives until that ends."""
        with self._lock:
            handoff = self._held.pop(object_id, None)
        if handoff is not None:
            handoff.let_go()

    def watch(self, object_id: str, told: Told) -> bool:
        """See `Handoffs`."""
        handoff = self._held.get(object_id)
        if handoff is not None:
            handoff.watch(told)
        return handoff is not None

    def release(self, object_id: str, index: int) -> None:
        """See `Handoffs`."""
        handoff = self._held.get(object_id)
        if handoff is not None:
            handoff.release(index)

    def describe(self, object_id: str, part: Part) -> tuple[str, bool] | None:
        """See `Handoffs`."""
        if object_id not in self._held:
            return None
        note = self._describe(part)
        return encode(note), note.offset is not None

    def sending_of(self, part: Part) -> Job:
        """See `Handoffs`."""
        layers = part.chunk.layers
        return partial(self._send, part.kv, layers is None or layers[1] == len(part.tensor))

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
