"""Groups of two over gloo; both ends are threads of this process."""

import multiprocessing
import os
import signal
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.synchronize import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.kv_transfer import group as group_module
from deployments.kv_transfer.group import Group, NcclGroup, Wait, build_group, host_store, join_store
from tests.waiting import stop_process, wait_until

HOST = "127.0.0.1"
# 800 MB: far from over when the first of them have come.
LARGE = 200_000_000
# For what must happen; a process that starts on a busy machine takes a while.
PATIENCE_S = 120
# For what must not end by itself.
LONG_S = 600


@pytest.fixture
def ends() -> tuple[Group, Group]:
    store, address = host_store(HOST, PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: build_group("cpu", join_store(address, PATIENCE_S), 1, HOST, PATIENCE_S))
        return build_group("cpu", store, 0, HOST, PATIENCE_S), other.result()


def send(group: Group, tensor: torch.Tensor, timeout_s: float, begun: threading.Event | None = None) -> None:
    finish(group.start_send(tensor), timeout_s, begun)


def recv(group: Group, tensor: torch.Tensor, timeout_s: float, begun: threading.Event | None = None) -> None:
    finish(group.start_recv(tensor), timeout_s, begun)


def finish(wait: Wait, timeout_s: float, begun: threading.Event | None) -> None:
    if begun is not None:
        begun.set()
    wait(timeout_s)


def check_waits(pending: "Future[None]", begun: threading.Event) -> None:
    """It was begun, and does not end by itself."""
    assert begun.wait(PATIENCE_S)
    with pytest.raises(TimeoutError):
        pending.result(timeout=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_arrive_unchanged(ends, dtype):
    sent = torch.randn(3, 2, 1000).to(dtype)
    received = torch.empty_like(sent)
    sender = threading.Thread(target=send, args=(ends[1], sent, PATIENCE_S))
    sender.start()
    recv(ends[0], received, PATIENCE_S)
    sender.join()
    assert torch.equal(received, sent)


def test_a_message_that_comes_in_place_of_another_is_not_taken_for_it(ends):
    sender, receiver = reversed(ends)
    next(receiver._receives)  # of a message that the sender has never begun
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, sender, torch.zeros(8), PATIENCE_S)
        with pytest.raises(RuntimeError, match="got message 0 in place of 1"):
            recv(receiver, torch.zeros(8), PATIENCE_S)
        receiver.abort()
        assert isinstance(sending.exception(PATIENCE_S), RuntimeError)


@pytest.mark.parametrize("aborting", [0, 1])
def test_abort_wakes_a_pending_receive_on_either_end(ends, aborting):
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(recv, ends[0], torch.empty(1_000_000), LONG_S, begun := threading.Event())
        check_waits(pending, begun)
        ends[aborting].abort()
        with pytest.raises(RuntimeError):
            pending.result(timeout=PATIENCE_S)


def test_abort_wakes_a_send_that_nobody_receives(ends):
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(send, ends[0], torch.empty(50_000_000), LONG_S, begun := threading.Event())
        check_waits(pending, begun)
        ends[0].abort()
        with pytest.raises(RuntimeError):
            pending.result(timeout=PATIENCE_S)


def test_a_receive_is_bounded_by_its_timeout(ends):
    with pytest.raises(RuntimeError, match="Timed out"):
        recv(ends[0], torch.empty(10), 0.2)


def test_forming_a_group_alone_is_bounded():
    store, _ = host_store(HOST, 0.5)
    with pytest.raises(RuntimeError):
        build_group("cpu", store, 0, HOST, 0.5)


def other_end(address: tuple[str, int], direction: str, ready: Event, moving: Event) -> None:
    group = build_group("cpu", join_store(address, PATIENCE_S), 1, HOST, PATIENCE_S)
    tensor = tensor_for("recv" if direction == "send" else "send")
    if direction == "send":
        threading.Thread(target=tell_when_moving, args=(tensor, moving), daemon=True).start()
    ready.set()
    (send if direction == "recv" else recv)(group, tensor, LONG_S)


def tell_when_moving(received: torch.Tensor, moving: Event) -> None:
    wait_until(lambda: has_first_byte(received), PATIENCE_S)
    moving.set()


def tensor_for(direction: str) -> torch.Tensor:
    return torch.ones(LARGE) if direction == "send" else torch.zeros(LARGE)


def has_first_byte(tensor: torch.Tensor | None) -> bool:
    """Whether some of it has been received; so it has been if it is gone."""
    return tensor is None or bool(tensor[0])


@pytest.mark.parametrize("stop_signal", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("direction", ["send", "recv"])
def test_a_peer_lost_amid_the_bytes_pins_nothing(direction, stop_signal):
    while not lose_peer(direction, stop_signal):
        pass


def lose_peer(direction: str, stop_signal: signal.Signals) -> bool:
    """Whether it was lost amid the bytes; on a busy machine all may have come before it could be stopped."""
    store, address = host_store(HOST, PATIENCE_S)
    context = multiprocessing.get_context("spawn")
    ready, moving = context.Event(), context.Event()
    other = context.Process(target=other_end, args=(address, direction, ready, moving), daemon=True)
    other.start()
    assert other.pid is not None
    try:
        group = build_group("cpu", store, 0, HOST, PATIENCE_S)
        tensors = [tensor_for(direction)]
        memory = weakref.ref(tensors[0])
        assert ready.wait(PATIENCE_S)
        carry = send if direction == "send" else recv
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(lambda: carry(group, tensors.pop(), LONG_S))
            wait_until(moving.is_set if direction == "send" else lambda: has_first_byte(memory()), PATIENCE_S)
            stop_process(other.pid)
            if pending.done():
                pending.result()
                return False
            os.kill(other.pid, stop_signal)
            group.abort()
            assert isinstance(pending.exception(timeout=PATIENCE_S), RuntimeError)
            del pending
        assert memory() is None
    finally:
        other.kill()
        other.join()
    return True


def test_a_message_that_takes_long_is_asked_about_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now, naps = 0.0, []

    def nap(seconds: float) -> None:
        nonlocal now
        naps.append(seconds)
        now += seconds + 50e-6  # as late as a thread wakes

    monkeypatch.setattr(group_module, "sleep", nap)
    monkeypatch.setattr(group_module, "monotonic", lambda: now)
    group = NcclGroup.__new__(NcclGroup)
    group._aborted = threading.Event()
    message: Any = SimpleNamespace(query=lambda: now >= 10.0)
    endless: Any = SimpleNamespace(query=lambda: False)
    while not group._wait(message, 0.0, 30.0 - now):
        assert naps[-1] <= max(20e-6, now / 16)
    assert naps[0] == 20e-6 and naps[-1] == 1e-3 and len(naps) < 10_000
    group._aborted.set()
    for begin in (group.start_send, group.start_recv):
        with pytest.raises(RuntimeError, match="aborted"):
            begin(torch.empty(1))
    with pytest.raises(TimeoutError):
        group._wait(endless, 0.0, 0.0)
