"""Two processes that can move tensors to each other: gloo on CPUs, NCCL on GPUs. Knows nothing of Ray or of KV."""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import count
from threading import Event
from time import monotonic, sleep
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

# Tags of gloo's messages. One with the last is never sent; see GlooGroup.abort.
_PAYLOAD, _SENT, _RECEIVED, _NEVER = range(4)
# Between two questions whether a message is over: each takes the interpreter's lock from a thread that launches, so
# they are few where one takes long. At most a sixteenth of its time is lost.
_SHORTEST_NAP_S, _LONGEST_NAP_S, _NAP_SHARE = 20e-6, 1e-3, 1 / 16
# torch's stubs leave out most of this class.
_ProcessGroupGloo: Any = dist.ProcessGroupGloo


# Takes a bound in seconds and waits a while; whether the message is over, on a GPU too. RuntimeError if the other end
# fails or the group is aborted, TimeoutError at the latest.
Wait = Callable[[float], bool]


class Group(Protocol):
    """One of the two ends. Messages are begun and waited for by one thread, in one order on both ends.

    Attributes:
        depth: messages that may be under way at once.
    """

    depth: int

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to receive into, uninitialized; its last reader must be done when it is freed."""
        ...

    def start_send(self, tensor: Tensor) -> Wait:
        """Begin to send a contiguous tensor; it may be freed or written to after the wait."""
        ...

    def start_recv(self, tensor: Tensor) -> Wait:
        """Begin to fill a contiguous tensor of the size that is sent; it is complete after the wait."""
        ...

    def abort(self) -> None:
        """End the group from any thread: waits in progress raise within milliseconds."""
        ...


def host_store(host: str, timeout_s: float) -> tuple[Store, tuple[str, int]]:
    """Open a store where the two ends of one group find each other; it lives as long as the object.

    A store for each group, because a client's wait holds up all others of the same client.
    """
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return store, (host, store.port)


def join_store(address: tuple[str, int], timeout_s: float) -> Store:
    """Meet the other end at its store."""
    host, port = address
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def build_group(device: str, store: Store, rank: int, host: str, timeout_s: float) -> Group:
    """Join a group of two; blocks until the other end does.

    Args:
        device: `cpu` or `cuda`, the same on both ends.
        store: shared by the two ends alone.
        rank: 0 or 1.
        host: address of this machine's interface that the other end can reach.
        timeout_s: bound of the wait for the other end.

    Raises:
        RuntimeError: the other end did not come in time.
    """
    if device == "cuda":
        return NcclGroup(store, rank)
    return GlooGroup(store, rank, host, timeout_s)


class GlooGroup:
    """A pair of gloo over TCP.

    A wait for a message whose bytes are on their way ends at its timeout alone, whoever dies meanwhile, and it pins the
    tensor until then; a wait for a message that has not begun ends at once (torch 2.13). So neither end waits for
    the payload: both wait for a small message behind it, and drop the payload's work if that does not come. It has the
    payload's number, so that no receiver takes a payload for another one.
    """

    depth = 1  # a second payload would come between the first and the message behind it

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def __init__(self, store: Store, rank: int, host: str, timeout_s: float) -> None:
        options = _ProcessGroupGloo._Options()
        # Without a device gloo takes whatever this machine's own name resolves to, which may be the loopback.
        options._devices = [_ProcessGroupGloo.create_device(hostname=host)]
        options._threads = 1
        options._timeout = timedelta(seconds=timeout_s)
        self._group = _ProcessGroupGloo(store, rank, 2, options)
        self._peer = 1 - rank
        self._sends, self._receives = count(), count()

    def start_send(self, tensor: Tensor) -> Wait:
        payload = self._group.send([tensor], self._peer, _PAYLOAD)
        sent = self._group.send([_mark(next(self._sends))], self._peer, _SENT)

        def wait(timeout_s: float) -> bool:
            timeout = timedelta(seconds=timeout_s)
            self._group.recv([_mark()], self._peer, _RECEIVED).wait(timeout)
            sent.wait(timeout)
            payload.wait(timeout)
            return True

        return wait

    def start_recv(self, tensor: Tensor) -> Wait:
        payload, expected = self._group.recv([tensor], self._peer, _PAYLOAD), _mark(next(self._receives))

        def wait(timeout_s: float) -> bool:
            timeout, sent = timedelta(seconds=timeout_s), _mark()
            self._group.recv([sent], self._peer, _SENT).wait(timeout)
            payload.wait(timeout)
            if not torch.equal(sent, expected):
                raise RuntimeError(f"got message {int(sent)} in place of {int(expected)}")
            self._group.send([_mark()], self._peer, _RECEIVED).wait(timeout)
            return True

        return wait

    def abort(self) -> None:
        # ProcessGroupGloo.abort() wakes nobody. But a wait that runs out of time closes the pair's socket, which
        # ends the waits of the other threads and those of the other end too: 3 to 11 ms (torch 2.13, 2 CPU cores,
        # peer stopped, killed or alive). https://github.com/pytorch/gloo: UnboundBuffer::waitRecv, signalException.
        with suppress(RuntimeError):
            self._group.recv([_mark()], self._peer, _NEVER).wait(timedelta(milliseconds=1))


def _mark(number: int = 0) -> Tensor:
    """What goes beside payloads: (1,) int64."""
    return torch.tensor([number])


class NcclGroup:
    """A communicator of two through cupy, on the process's first GPU and a stream of its own.

    Forming it has no timeout of its own: whoever calls does so on a thread that can be left behind. The tests of the
    CPU do not reach this; `pytest -m gpu tests/kv_transfer` does (seen on one H100, two processes, NCCL over loopback).
    """

    depth = 4  # so that the link is not idle while the ends wake up and speak about the next message

    def __init__(self, store: Store, rank: int) -> None:
        from cupy.cuda import nccl

        if rank == 0:
            store.set("nccl_id", nccl.get_unique_id())
        self._comm = nccl.NcclCommunicator(2, store.get("nccl_id"), rank)
        self._byte = nccl.NCCL_UINT8
        self._peer = 1 - rank
        # First in line for what a step leaves free of the GPU: a chunk takes few of its processors, and someone waits.
        self._stream = torch.cuda.Stream(priority=-1)
        self._aborted = Event()
        self._warm_up()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # On this stream: memory of the current one would have to wait for the steps that are queued there.
        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device="cuda")

    def start_send(self, tensor: Tensor) -> Wait:
        self._check()
        self._comm.send(tensor.data_ptr(), tensor.nbytes, self._byte, self._peer, self._stream.cuda_stream)
        return partial(self._wait, self._stream.record_event(), monotonic())

    def start_recv(self, tensor: Tensor) -> Wait:
        self._check()
        self._comm.recv(tensor.data_ptr(), tensor.nbytes, self._byte, self._peer, self._stream.cuda_stream)
        return partial(self._wait, self._stream.record_event(), monotonic())

    def abort(self) -> None:
        if not self._aborted.is_set():
            self._aborted.set()
            self._comm.abort()

    def _warm_up(self) -> None:
        """Connect: the first message of a communicator takes a hundred times as long as the next ones."""
        byte = torch.zeros(1, dtype=torch.uint8, device="cuda")
        self._stream.wait_stream(torch.cuda.current_stream())
        (self.start_send if self._peer == 0 else self.start_recv)(byte)
        self._stream.synchronize()

    def _wait(self, done: torch.cuda.Event, since: float, timeout_s: float) -> bool:
        """Poll instead of synchronizing: a dead peer would keep the stream busy forever."""
        if not done.query():
            if timeout_s <= 0:
                raise TimeoutError("NCCL transfer not done in time")
            sleep(min(_LONGEST_NAP_S, max(_SHORTEST_NAP_S, (monotonic() - since) * _NAP_SHARE)))
            return False
        self._check()
        return True

    def _check(self) -> None:
        if self._aborted.is_set():
            raise RuntimeError("NCCL group was aborted")
