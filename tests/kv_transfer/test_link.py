"""One link with a peer and a group that the test controls."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deployments.errors import TransferError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, Wait
from deployments.kv_transfer.inquiries import Inquiries, Want
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Job, Link, LinkLostError, Steps, Watchdog, until_over
from tests.kv_transfer.peers import FakePeer
from tests.kv_transfer.threads import kv_threads, slack_ns
from tests.waiting import wait_until

CONFIG = TransferConfig(probe_interval_s=0.01)
# What never happens takes longer than this.
PATIENCE_S = 30.0


class FakeGroup:
    """What is received waits until the test lets it go or the group is aborted."""

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth
        self.is_receiving = threading.Event()
        self.may_finish = threading.Event()
        self.is_aborted = False

    def start_send(self, tensor: Tensor) -> Wait:
        raise AssertionError("not used here")

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raise AssertionError("not used here")

    def start_recv(self, tensor: Tensor) -> Wait:
        return self._wait

    def _wait(self, timeout_s: float) -> bool:
        self.is_receiving.set()
        assert self.may_finish.wait(2 * PATIENCE_S)
        if self.is_aborted:
            raise RuntimeError("aborted")
        return True

    def abort(self) -> None:
        self.is_aborted = True
        self.may_finish.set()


class NoLine(Line):
    """To nobody."""

    def __init__(self) -> None:
        self.is_closed = False
        self.said: list[str] = []
        self._ends = threading.Event()

    def say(self, message: str) -> None:
        self.said.append(message)

    def hear(self, timeout_s: float | None = None) -> str | None:
        self._ends.wait()
        return None

    def close(self) -> None:
        self.is_closed = True
        self._ends.set()


class Rig:
    """A link, and what surrounds it."""

    def __init__(
        self,
        config: TransferConfig = CONFIG,
        open_channel: Callable[[], Channel] | None = None,
        depth: int = 1,
        inquiries: Inquiries | None = None,
    ) -> None:
        self.peer = FakePeer()
        self.group, self.line = FakeGroup(depth), NoLine()
        self.closed: list[Link] = []
        connect = open_channel or (lambda: Channel(self.group, self.line))
        self.link = Link("test", self.peer, connect, config, self.closed.append, inquiries)

    def receive(self) -> "Future[Tensor | None]":
        def job(group: Group, config: TransferConfig) -> Steps:
            tensor = torch.zeros(4)
            wait = group.start_recv(tensor)
            yield True
            yield from until_over(wait, 2 * PATIENCE_S)
            return tensor

        return self.link.submit(job)

    def note(self, notes: list[tuple[str, int]], number: int) -> "Future[Tensor | None]":
        """A job that writes down when it begins and ends."""

        def job(group: Group, config: TransferConfig) -> Steps:
            notes.append(("start", number))
            wait = group.start_recv(torch.zeros(4))
            yield True
            yield from until_over(wait, 2 * PATIENCE_S)
            notes.append(("end", number))
            return None

        return self.link.submit(job)

    def check_until_closed(self) -> None:
        def is_closed() -> bool:
            self.link.check()
            return self.link.is_closed

        wait_until(is_closed, PATIENCE_S)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.link.close("end of the test")


def test_jobs_poll_on_a_thread_that_wakes_promptly(rig):
    def job(group: Group, config: TransferConfig) -> Steps:
        yield True
        return torch.tensor(slack_ns())

    assert rig.link.submit(job).result(PATIENCE_S).item() <= 1


def test_without_depth_jobs_run_one_at_a_time_and_in_order(rig):
    notes: list[tuple[str, int]] = []
    rig.group.may_finish.set()
    for future in [rig.note(notes, i) for i in range(50)]:
        future.result(timeout=PATIENCE_S)
    assert notes == [(step, i) for i in range(50) for step in ("start", "end")]


def test_as_many_jobs_as_the_group_takes_are_under_way_and_each_step_keeps_their_order():
    rig = Rig(depth=3)
    notes: list[tuple[str, int]] = []
    futures = [rig.receive(), *(rig.note(notes, i) for i in range(20))]
    assert rig.group.is_receiving.wait(PATIENCE_S)
    rig.group.may_finish.set()
    for future in futures:
        future.result(timeout=PATIENCE_S)
    under_way = most = 0
    for step, _ in notes:
        under_way += {"start": 1, "end": -1}[step]
        most = max(most, under_way)
    assert most == 3
    for step in ("start", "end"):
        assert [i for name, i in notes if name == step] == list(range(20))
    rig.link.close("end of the test")


def test_a_lost_link_fails_all_jobs_that_are_under_way():
    rig = Rig(depth=3)
    futures = [rig.receive() for _ in range(5)]
    assert rig.group.is_receiving.wait(PATIENCE_S)
    rig.link.close("over")
    for future in futures:
        with pytest.raises(TransferError, match="over"):
            future.result(timeout=PATIENCE_S)


def test_a_dead_peer_fails_every_job_and_ends_the_group(rig):
    futures = [rig.receive() for _ in range(3)]
    assert rig.group.is_receiving.wait(PATIENCE_S)
    rig.peer.is_dead = True
    rig.link.check()
    for future in futures:
        with pytest.raises(TransferError, match="died"):
            future.result(timeout=PATIENCE_S)
    assert rig.group.is_aborted and rig.line.is_closed
    assert rig.closed == [rig.link]


def test_a_silent_peer_keeps_the_transfer_in_progress_and_fails_those_behind_it(rig):
    first = rig.receive()
    assert rig.group.is_receiving.wait(PATIENCE_S)
    second = rig.receive()
    rig.peer.has_been_silent_s = 3.0
    rig.link.check()
    with pytest.raises(TransferError, match="not answered"):
        second.result(timeout=PATIENCE_S)
    with pytest.raises(TransferError, match="not answered"):
        rig.receive()
    rig.group.may_finish.set()
    assert first.result(timeout=PATIENCE_S) is not None


def test_a_link_ends_behind_a_job_that_one_end_alone_has_given_up(rig):
    """The other end moves its message all the same, and what comes behind would be taken for it."""
    first = rig.receive()
    assert rig.group.is_receiving.wait(PATIENCE_S)
    given_up = rig.receive()
    rig.peer.has_been_silent_s = 3.0
    rig.link.check()
    assert given_up.exception(timeout=PATIENCE_S) is not None
    rig.peer.has_been_silent_s = 0.0
    rig.link.check()
    with pytest.raises(LinkLostError, match="given up"):
        rig.receive()
    assert not rig.link.is_closed, "the transfer in progress goes on"
    rig.group.may_finish.set()
    assert first.result(timeout=PATIENCE_S) is not None
    wait_until(lambda: rig.link.is_closed, PATIENCE_S)
    assert rig.line.is_closed, "the other end sees it"


def test_a_peer_that_was_silent_while_nothing_waited_keeps_its_link(rig):
    rig.group.may_finish.set()
    rig.receive().result(timeout=PATIENCE_S)
    for silent_s in (3.0, 0.0):
        rig.peer.has_been_silent_s = silent_s
        rig.link.check()
    assert rig.receive().result(timeout=PATIENCE_S) is not None


def test_a_job_that_cannot_begin_holds_up_none_that_has_and_lets_none_pass():
    """What gives it room may be the end of one that is under way on the same link."""
    rig = Rig(depth=3)
    room, notes = threading.Semaphore(1), list[tuple[str, int]]()

    def receive(number: int) -> "Future[Tensor | None]":
        def job(group: Group, config: TransferConfig) -> Steps:
            while not room.acquire(timeout=0.001):
                yield False
            notes.append(("start", number))
            yield True
            yield from until_over(group.start_recv(torch.zeros(4)), 2 * PATIENCE_S)
            notes.append(("end", number))
            return None

        received = rig.link.submit(job)
        received.add_done_callback(lambda _: room.release())
        return received

    futures = [receive(i) for i in range(6)]
    rig.group.may_finish.set()
    for future in futures:
        future.result(timeout=PATIENCE_S)
    assert notes == [(step, i) for i in range(6) for step in ("start", "end")]
    rig.link.close("end of the test")


def test_a_transfer_that_takes_too_long_ends_the_link():
    rig = Rig(replace(CONFIG, transfer_timeout_s=0.1))
    future = rig.receive()
    rig.check_until_closed()
    with pytest.raises(TransferError, match=r"not done after 0\.1 s"):
        future.result(timeout=PATIENCE_S)
    assert rig.group.is_aborted and rig.line.is_closed


def test_a_group_that_does_not_form_in_time_fails_its_jobs_and_is_ended_when_it_comes():
    late = FakeGroup()
    may_form = threading.Event()

    def open_channel() -> Channel:
        assert may_form.wait(PATIENCE_S)
        return Channel(late, NoLine())

    rig = Rig(replace(CONFIG, connect_timeout_s=0.1), open_channel)
    future = rig.receive()
    rig.check_until_closed()
    with pytest.raises(TransferError, match="no connection"):
        future.result(timeout=PATIENCE_S)
    may_form.set()
    assert late.may_finish.wait(PATIENCE_S) and late.is_aborted


def test_an_error_while_forming_the_group_reaches_the_jobs():
    def open_channel() -> Channel:
        raise RuntimeError("no route to host")

    rig = Rig(open_channel=open_channel)
    with pytest.raises(TransferError, match="no route to host"):
        rig.receive().result(timeout=PATIENCE_S)


def test_a_job_that_fails_ends_the_link_which_would_take_the_next_message_for_its_own(rig):
    def failing(group: Group, config: TransferConfig) -> Steps:
        yield True
        raise TransferError("broken")

    rig.group.may_finish.set()
    futures = [rig.link.submit(failing), rig.receive()]
    for future in futures:
        with pytest.raises(TransferError, match="broken"):
            future.result(timeout=PATIENCE_S)
    assert rig.link.is_closed


def test_a_job_after_the_end_is_told_to_take_a_new_link(rig):
    rig.link.close("over")
    with pytest.raises(LinkLostError):
        rig.receive()


def test_an_unused_link_gives_its_group_back_when_the_end_that_asks_says_so():
    config = replace(CONFIG, idle_timeout_s=0.1)
    asking, asked = Rig(config, inquiries=Inquiries()), Rig(config)
    for rig in (asking, asked):
        rig.group.may_finish.set()
        rig.receive().result(timeout=PATIENCE_S)
    asking.check_until_closed()
    assert asking.group.is_aborted and asking.line.is_closed
    asked.link.check()
    assert not asked.link.is_closed
    asked.link.close("end of the test")


def _not_sent(note: str) -> Job:
    raise AssertionError("nothing is sent")


def test_a_link_is_used_as_long_as_something_is_asked_for():
    inquiries = Inquiries()
    rig = Rig(replace(CONFIG, idle_timeout_s=0.01), inquiries=inquiries)
    inquiries.ask(Want.LOOK, "a", lambda heard: None, _not_sent)
    wait_until(lambda: rig.line.said != [], PATIENCE_S)
    time.sleep(0.05)
    rig.link.check()
    assert not rig.link.is_closed
    rig.link.close("end of the test")


def test_threads_end_with_their_links():
    rigs = [Rig() for _ in range(3)]
    watchdog = Watchdog()
    for rig in rigs:
        watchdog.watch(rig.link, 0.01)
    for rig in rigs:
        rig.link.close("end of the test")
    for thread in (*kv_threads("watchdog"), *kv_threads("link-test")):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
