"""One pair of engines, seen from one of them: a thread that opens a channel, then runs jobs over it, in turn.

Owns two rules. Jobs begin in the order in which they were submitted, on both ends, for a group pairs messages by their
order; so none begins before one that still has to wait for its beginning, and that one holds up none that has begun.
And nothing here waits without a bound: `Watchdog` asks the peers of all links whether they live, without waiting for
the answers, and ends the links of those that died or hang. Knows Ray's actors; nothing of KV or layouts.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Lock, Thread
from time import monotonic, sleep
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from torch import Tensor

from deployments.errors import TransferError, brief
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, Wait
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.naps import nap_exactly

logger = logging.getLogger(__name__)

CONTROL_GROUP = "kv_ctl"
# A job pauses each time that it cannot begin its message yet, and says False; then it begins it, pauses, and waits for
# it, with a pause each time that it is not over: these say True. As many as the group can have under way are at work:
# each begins as soon as it may, and the first one is waited for. No step may take long.
Steps = Generator[bool, None, Tensor | None]
Job = Callable[[Group, TransferConfig], Steps]
_MISSED = "the other engine has not answered for a while, and one end has given up what the other one may still move"


class LinkLostError(TransferError):
    """The other end had closed the link before the transfer began: a new link will do."""


class RemoteCall(Protocol):
    """Ray's way to run a function in an actor's process."""

    def options(self, *, concurrency_group: str) -> "RemoteCall": ...

    def remote(self, function: Callable[..., Any], *args: object) -> "ray.ObjectRef[Any]": ...


class RemoteEngine(Protocol):
    """The actor of another engine, as the hand-off sees it: functions of this room can be run in its process."""

    @property
    def __ray_call__(self) -> RemoteCall: ...


def call_engine(actor: RemoteEngine, function: Callable[..., Any], *args: object) -> "ray.ObjectRef[Any]":
    """Run `function(engine, *args)` in the engine's process, in the group of threads kept for short calls."""
    return actor.__ray_call__.options(concurrency_group=CONTROL_GROUP).remote(function, *args)


def _answer(_engine: object) -> None:
    """The question whether an engine lives; being run is the answer."""


def until_over(wait: Wait, timeout_s: float) -> Generator[bool]:
    """The second half of a job."""
    deadline = monotonic() + timeout_s
    while not wait(deadline - monotonic()):
        yield True


class OpenInquiries(Protocol):
    """What is asked over a link, and fails with it. Any thread may call these."""

    @property
    def are_open(self) -> bool:
        """Whether the other end owes an answer."""
        ...

    def begin(self, link: "Link", line: Line) -> None:
        """The link stands."""
        ...

    def fail(self, kind: type[TransferError], reason: str) -> None:
        """Those that are open are waited for no longer."""
        ...

    def end(self, kind: type[TransferError], reason: str) -> None:
        """Nor are those to come."""
        ...


class Peer:
    """Whether another engine lives, found out without waiting for it."""

    def __init__(self, actor: RemoteEngine) -> None:
        self.actor = actor
        self._question: ray.ObjectRef[Any] | None = None
        self._asked_at = monotonic()

    def silent_s(self, interval_s: float) -> float:
        """How long the peer has left a question open; asks a new one every `interval_s`. RayError: it is dead."""
        now = monotonic()
        if self._question is not None:
            if not ray.wait([self._question], timeout=0)[0]:
                return now - self._asked_at
            question, self._question = self._question, None
            ray.get(question)
        if now - self._asked_at >= interval_s:
            self._question = call_engine(self.actor, _answer)
            self._asked_at = now
        return 0.0


@dataclass(slots=True, eq=False)
class _Task:
    job: Job
    future: "Future[Tensor | None]"
    steps: Steps | None = None
    has_begun: bool = False

    def fail(self, kind: type[TransferError], reason: str) -> None:
        # A new exception for each: one that was raised elsewhere has a traceback, and that pins tensors.
        self.future.set_exception(kind(reason))


class Link:
    """One end of a pair.

    Args:
        name: of the link, unique among all that were ever opened.
        peer: the engine at the other end.
        open_channel: to the other end; runs on the link's thread and may block for `connect_timeout_s`.
        config: the bounds.
        on_close: called once, from any thread, with the link.
        inquiries: of this end; None: the other end asks.
    """

    def __init__(
        self,
        name: str,
        peer: Peer,
        open_channel: Callable[[], Channel],
        config: TransferConfig,
        on_close: "Callable[[Link], None]",
        inquiries: OpenInquiries | None = None,
    ) -> None:
        self.name = name
        self.peer = peer
        self._open_channel = open_channel
        self._config = config
        self._on_close = on_close
        self._inquiries = inquiries
        self._changed = Condition(Lock())
        # All below is guarded by _changed. Whoever takes a task out of it finishes its future, and nobody else.
        self._waiting: deque[_Task] = deque()
        self._current: deque[_Task] = deque()
        self._is_newest_next = False
        # Some job that the other end knows of was failed: what comes behind would be taken for it.
        self._is_ending = False
        self._channel: Channel | None = None
        self._state_since = monotonic()
        self._doubt: str | None = None
        self._closed: str | None = None
        Thread(target=self._run, name=f"kv-link-{name}", daemon=True).start()

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    def submit(self, job: Job) -> "Future[Tensor | None]":
        """Run a job behind those that came before. If one fails the link closes, for the other end has begun it, too.

        Raises:
            LinkLostError: the link is closed, or about to be.
            TransferError: the peer does not answer.
        """
        task = _Task(job, Future())
        with self._changed:
            if self._closed is not None:
                raise LinkLostError(self._closed)
            if self._doubt is not None:
                raise TransferError(self._doubt)
            if self._is_ending:
                raise LinkLostError(_MISSED)
            self._waiting.append(task)
            self._changed.notify()
        return task.future

    def close(self, reason: str, kind: type[TransferError] = TransferError) -> None:
        """End the channel and fail every job. Idempotent, from any thread."""
        with self._changed:
            if self._closed is not None:
                return
            self._closed = reason
            tasks = [*self._current, *self._waiting]
            self._current.clear()
            self._waiting.clear()
            channel, self._channel = self._channel, None
            self._changed.notify()
        if channel is not None:
            channel.abort()
        for task in tasks:
            task.fail(kind, reason)
        self._on_close(self)
        if self._inquiries is not None:
            self._inquiries.end(kind, reason)

    def check(self) -> None:
        """Close the link if its peer is dead, its time is over, or nobody has used it for long. Never waits."""
        with self._changed:
            is_connecting, is_moving = self._channel is None, bool(self._current)
            state_s = monotonic() - self._state_since
        awaited = self._inquiries is not None and self._inquiries.are_open
        is_busy = is_connecting or is_moving or awaited
        config = self._config
        try:
            silent_s = self.peer.silent_s(config.probe_interval_s if is_busy else config.idle_probe_interval_s)
        except RayError:
            self.close("the other engine died")
            return
        if is_connecting and state_s > config.connect_timeout_s:
            self.close(f"no connection to the other engine after {config.connect_timeout_s} s")
        elif is_moving and state_s > config.transfer_timeout_s:
            self.close(f"transfer not done after {config.transfer_timeout_s} s")
        elif self._inquiries is not None and not is_busy and state_s > config.idle_timeout_s:
            # Who asks knows. What is asked at this moment is worth a new link.
            self.close("unused", LinkLostError)
        else:
            self._set_doubt(silent_s > config.doubt_after_s)

    def _set_doubt(self, in_doubt: bool) -> None:
        reason = f"the other engine has not answered for {self._config.doubt_after_s} s" if in_doubt else None
        with self._changed:
            self._doubt = reason
            tasks = list(self._waiting) if in_doubt else []
            if tasks:
                self._waiting.clear()
                self._is_ending = True
                self._changed.notify()
        for task in tasks:
            task.fail(TransferError, str(reason))
        if in_doubt and self._inquiries is not None:
            self._inquiries.fail(TransferError, str(reason))

    def _run(self) -> None:
        nap_exactly()
        reason = self._connect()
        if reason is not None:
            self.close(reason)
        while (task := self._turn()) is not None:
            self._advance(task)
            # Else this name would keep the last chunk until the next one comes.
            del task
        self.close(_MISSED, LinkLostError)

    def _connect(self) -> str | None:
        """Open the channel; why not, if it failed. A late one of a closed link is ended at once."""
        try:
            channel = self._open_channel()
        except Exception as error:
            return f"cannot form a group with the other engine: {brief(error)}"
        with self._changed:
            if is_open := self._closed is None:
                self._channel = channel
                self._state_since = monotonic()
        if not is_open:
            channel.abort()
        elif self._inquiries is not None:
            self._inquiries.begin(self, channel.line)
        return None

    def _turn(self) -> _Task | None:
        """Wait for a job: one that can begin, else the first that has; None once the link is closed, or is to be."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed is not None or self._is_ending or self._waiting or self._current
            )
            if self._closed is not None or self._channel is None or not (self._waiting or self._current):
                return None
            assert self._channel.group is not None, "there is nothing to move over this link"
            if self._current and not self._current[-1].has_begun:
                # The newest and the first in turn: it begins when there is room, which the first may have to give.
                self._is_newest_next = not self._is_newest_next
                return self._current[-1] if self._is_newest_next else self._current[0]
            if self._waiting and len(self._current) < self._channel.group.depth:
                if not self._current:
                    self._state_since = monotonic()
                task = self._waiting.popleft()
                task.steps = task.job(self._channel.group, self._config)
                self._current.append(task)
                return task
            return self._current[0]

    def _advance(self, task: _Task) -> None:
        assert task.steps is not None
        try:
            task.has_begun = next(task.steps) or task.has_begun
        except StopIteration as end:
            if self._finish(task):
                task.future.set_result(end.value)
        except Exception as error:
            self.close(f"transfer failed: {brief(error)}")

    def _finish(self, task: _Task) -> bool:
        """Take the job out; False if `close` was first and has failed it."""
        with self._changed:
            is_ours = task in self._current
            if is_ours:
                self._current.remove(task)
                self._state_since = monotonic()
            return is_ours


class Watchdog:
    """Checks every open link a few times a second, on a thread that lives as long as there are links."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._links: set[Link] = set()
        self._is_running = False

    def watch(self, link: Link, interval_s: float) -> None:
        with self._lock:
            self._links.add(link)
            if not self._is_running:
                self._is_running = True
                Thread(target=self._run, args=(interval_s,), name="kv-watchdog", daemon=True).start()

    def _run(self, interval_s: float) -> None:
        while links := self._open_links():
            for link in links:
                try:
                    link.check()
                except Exception as error:
                    logger.exception("link %s cannot be watched", link.name)
                    link.close(f"the link cannot be watched: {brief(error)}")
            del link, links
            sleep(interval_s)

    def _open_links(self) -> list[Link]:
        with self._lock:
            self._links = {link for link in self._links if not link.is_closed}
            self._is_running = bool(self._links)
            return list(self._links)
