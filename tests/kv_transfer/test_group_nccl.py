"""Groups of two over NCCL. One GPU is enough: two processes that claim to be two hosts talk over loopback sockets."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch

from deployments.kv_transfer.group import Group, Wait, build_group, host_store, join_store
from deployments.kv_transfer.link import until_over

HOST = "127.0.0.1"
SIZES = (1000, 25_000_000, 1000)

pytestmark = pytest.mark.gpu


def join(rank: int, addresses: Any) -> Group:
    os.environ.update(NCCL_HOSTID=f"host-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    torch.cuda.init()
    if rank == 1:
        return build_group("cuda", join_store(addresses.get(), 20), 1, HOST, 20)
    store, address = host_store(HOST, 20)
    addresses.put(address)
    return build_group("cuda", store, 0, HOST, 20)


def finish(wait: Wait, timeout_s: float, waits: threading.Event | None = None) -> None:
    for _ in until_over(wait, timeout_s):
        if waits is not None:
            waits.set()


def send_all(addresses: Any, may_leave: Event) -> None:
    """Send, and stay in silence for as long as it may not leave."""
    group = join(1, addresses)
    tensors = [torch.arange(size, device="cuda", dtype=torch.float32) for size in SIZES]
    torch.cuda.synchronize()
    for wait in [group.start_send(tensor) for tensor in tensors]:
        finish(wait, 20)
    may_leave.wait()


def receive_all(addresses: Any, results: Any, may_abort: Event) -> None:
    group = join(0, addresses)
    begun = []
    for size in SIZES:
        received = group.allocate((size,), torch.float32)
        begun.append((size, received, group.start_recv(received)))
    for size, received, wait in begun:
        finish(wait, 20)
        results.put(torch.equal(received.cpu(), torch.arange(size, dtype=torch.float32)))
    with ThreadPoolExecutor(1) as pool:
        waits, wait = threading.Event(), group.start_recv(group.allocate((10_000_000,), torch.float32))
        pending = pool.submit(finish, wait, 60, waits)
        results.put(waits.wait(20))
        may_abort.wait()
        group.abort()
        results.put(isinstance(pending.exception(timeout=5), RuntimeError))
    results.put(float(torch.ones(10, device="cuda").sum()) == 10)


@pytest.mark.parametrize("leaves", [False, True], ids=["silent peer", "dead peer"])
def test_bytes_arrive_and_abort_wakes_the_receiver(leaves):
    context = multiprocessing.get_context("spawn")
    addresses, results, may_leave, may_abort = context.Queue(), context.Queue(), context.Event(), context.Event()
    sender = context.Process(target=send_all, args=(addresses, may_leave), daemon=True)
    receiver = context.Process(target=receive_all, args=(addresses, results, may_abort), daemon=True)
    sender.start()
    receiver.start()
    try:
        # All has come, and the receiver waits for more.
        assert [results.get(timeout=60) for _ in range(len(SIZES) + 1)] == [True] * (len(SIZES) + 1)
        if leaves:
            may_leave.set()
            sender.join(60)
            assert not sender.is_alive()
        may_abort.set()
        assert [results.get(timeout=60) for _ in range(2)] == [True] * 2
    finally:
        for process in (sender, receiver):
            process.kill()
            process.join()
