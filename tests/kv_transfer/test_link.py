"""One link with a peer and a group that the test controls."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from time import monotonic, sleep

import pytest
import torch
from ray.exceptions import RayError
from torch import Tensor

from deployments.errors import TransferError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Link, LinkLostError, Peer, Watchdog

CONFIG = TransferConfig(probe_interval_s=0.01)


class FakePeer(Peer):
    """Lives, hangs or is dead as the test says."""

    def __init__(self) -> None:
        self.is_dead = False
        self.has_been_silent_s = 0.0

    def silent_s(self, interval_s: float) -> float:
        if self.is_dead:
            raise RayError
        return self.has_been_silent_s


class FakeGroup:
    """`recv` blocks until the test lets it go or the group is aborted."""

    def __init__(self) -> None:
        self.is_receiving = threading.Event()
        self.may_finish = threading.Event()
        self.is_aborted = False

    def send(self, tensor: Tensor, timeout_s: float) -> None:
        raise AssertionError("not used here")

    def recv(self, tensor: Tensor, timeout_s: float) -> None:
        self.is_receiving.set()
        assert self.may_finish.wait(10)
        if self.is_aborted:
            raise RuntimeError("aborted")

    def abort(self) -> None:
        self.is_aborted = True
        self.may_finish.set()


class NoLine(Line):
    """To nobody."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Rig:
    """A link, and what surrounds it."""

    def __init__(self, config: TransferConfig = CONFIG, open_channel: Callable[[], Channel] | None = None) -> None:
        self.peer = FakePeer()
        self.group, self.line = FakeGroup(), NoLine()
        self.closed: list[Link] = []
        self.link = Link(
            "test", self.peer, open_channel or (lambda: Channel(self.group, self.line)), config, self.closed.append
        )

    def receive(self) -> "Future[Tensor | None]":
        def job(channel: Channel) -> Tensor:
            tensor = torch.zeros(4)
            channel.group.recv(tensor, 10)
            return tensor

        return self.link.submit(job)

    def check_until_closed(self) -> None:
        deadline = monotonic() + 5
        while not self.link.is_closed:
            assert monotonic() < deadline
            self.link.check()
            sleep(0.01)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.link.close("end of the test")


def test_jobs_run_one_at_a_time_and_in_order(rig):
    order: list[int] = []
    rig.group.may_finish.set()
    for future in [rig.link.submit(lambda _, i=i: order.append(i)) for i in range(50)]:
        future.result(timeout=5)
    assert order == list(range(50))


def test_a_dead_peer_fails_every_job_and_ends_the_group(rig):
    futures = [rig.receive() for _ in range(3)]
    assert rig.group.is_receiving.wait(5)
    rig.peer.is_dead = True
    rig.link.check()
    for future in futures:
        with pytest.raises(TransferError, match="died"):
            future.result(timeout=1)
    assert rig.group.is_aborted and rig.line.is_closed
    assert rig.closed == [rig.link]


def test_a_silent_peer_keeps_the_transfer_in_progress_and_fails_those_behind_it(rig):
    first = rig.receive()
    assert rig.group.is_receiving.wait(5)
    second = rig.receive()
    rig.peer.has_been_silent_s = 3.0
    rig.link.check()
    with pytest.raises(TransferError, match="not answered"):
        second.result(timeout=1)
    with pytest.raises(TransferError, match="not answered"):
        rig.receive()
    rig.peer.has_been_silent_s = 0.0
    rig.link.check()
    third = rig.receive()
    rig.group.may_finish.set()
    assert first.result(timeout=5) is not None
    assert third.result(timeout=5) is not None


def test_a_transfer_that_takes_too_long_ends_the_link():
    rig = Rig(replace(CONFIG, transfer_timeout_s=0.1))
    future = rig.receive()
    rig.check_until_closed()
    with pytest.raises(TransferError, match=r"not done after 0\.1 s"):
        future.result(timeout=1)
    assert rig.group.is_aborted and rig.line.is_closed


def test_a_group_that_does_not_form_in_time_fails_its_jobs_and_is_ended_when_it_comes():
    late = FakeGroup()
    may_form = threading.Event()

    def open_channel() -> Channel:
        assert may_form.wait(10)
        return Channel(late, NoLine())

    rig = Rig(replace(CONFIG, connect_timeout_s=0.1), open_channel)
    future = rig.receive()
    rig.check_until_closed()
    with pytest.raises(TransferError, match="no connection"):
        future.result(timeout=1)
    may_form.set()
    assert late.may_finish.wait(5) and late.is_aborted


def test_an_error_while_forming_the_group_reaches_the_jobs():
    def open_channel() -> Channel:
        raise RuntimeError("no route to host")

    rig = Rig(open_channel=open_channel)
    with pytest.raises(TransferError, match="no route to host"):
        rig.receive().result(timeout=5)


def test_a_job_refused_by_the_source_fails_alone(rig):
    def refused(channel: Channel) -> None:
        raise TransferError("gone")

    rig.group.may_finish.set()
    with pytest.raises(TransferError, match="gone"):
        rig.link.submit(refused).result(timeout=5)
    assert rig.receive().result(timeout=5) is not None


def test_a_job_after_the_end_is_told_to_take_a_new_link(rig):
    rig.link.close("over")
    with pytest.raises(LinkLostError):
        rig.receive()


def test_an_unused_link_gives_its_group_back():
    rig = Rig(replace(CONFIG, idle_timeout_s=0.1))
    rig.group.may_finish.set()
    rig.receive().result(timeout=5)
    rig.check_until_closed()
    assert rig.group.is_aborted and rig.line.is_closed


def test_threads_end_with_their_links():
    rigs = [Rig() for _ in range(3)]
    watchdog = Watchdog()
    for rig in rigs:
        watchdog.watch(rig.link, 0.01)
    for rig in rigs:
        rig.link.close("end of the test")
    for thread in threading.enumerate():
        if thread.name in {"kv-watchdog", "kv-link-test"}:
            thread.join(5)
            assert not thread.is_alive()
