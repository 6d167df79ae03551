"""Chunks that an engine reads in another one's memory, when both are on one machine: no copy, no link, no wait.

An engine copies what it exports into its `Arena`. A reference to a hand-off carries its `Place`; `Neighbours` of the
receiving process views chunks there. Knows nothing of Ray.
"""

import logging
import os
import select
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from threading import Lock, Thread

import torch
from torch import Tensor

from deployments.kv_transfer.shared_memory import Address, Memory, OwnMemory, create_memory, machine

logger = logging.getLogger(__name__)

_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies.

    Attributes:
        machine: processes with another one cannot reach it.
        address: of the memory.
        offset: of the tensor's first byte in it.
    """

    machine: str
    address: Address
    offset: int

    def at(self, offset: int) -> "Place":
        """Of a tensor in the same memory."""
        return replace(self, offset=offset)


class Arena:
    """Memory that other engines of the machine can read, of a fixed size, taken when it is first needed.

    Args:
        nbytes: its size.
        device: `cpu` or `cuda`.
    """

    def __init__(self, nbytes: int, device: str) -> None:
        self._nbytes = nbytes
        self._device = device
        self._memory: OwnMemory | None = None
        self._failed = False
        self._base = 0
        self._machine = machine()
        self._used: dict[int, int] = {}
        self._lock = Lock()
        # Not under the lock: a tensor may be dropped anywhere, also by this very thread amid `allocate`.
        self._freed: deque[int] = deque()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A contiguous tensor, uninitialized, whose room is free again when the last view of it is gone.

        None if there is no room for it now. Safe from any thread.
        """
        nbytes = prod(shape) * dtype.itemsize
        with self._lock:
            while self._freed:
                del self._used[self._freed.popleft()]
            offset = self._find_gap(nbytes)
            memory = self._open() if offset is not None else None
            if offset is None or memory is None:
                return None
            self._used[offset] = nbytes
        return memory.tensor(offset, nbytes, partial(self._freed.append, offset)).view(dtype).view(shape)

    @property
    def place(self) -> Place | None:
        """Where it begins, taken now if it was not before; None: others find nothing here. Safe from any thread."""
        with self._lock:
            memory = self._open()
        return None if memory is None else Place(self._machine, memory.address, 0)

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where others find a tensor; None if it is not from here. Safe from any thread."""
        offset = tensor.data_ptr() - self._base
        if self._memory is None or not 0 <= offset < self._nbytes:
            return None
        return Place(self._machine, self._memory.address, offset)

    def _open(self) -> OwnMemory | None:
        if self._memory is None and not self._failed:
            try:
                memory = create_memory(self._nbytes, self._device)
            except (OSError, RuntimeError, ImportError) as error:
                logger.warning("KV goes over the network also to engines of this machine: %s", error)
                self._failed = True
            else:
                self._base = memory.data_ptr
                self._memory = memory
        return self._memory

    def _find_gap(self, nbytes: int) -> int | None:
        """The first gap that is long enough."""
        start = 0
        for offset, used in chain(sorted(self._used.items()), [(self._nbytes, 0)]):
            if offset - start >= nbytes:
                return start
            start = -(-(offset + used) // _ALIGNMENT) * _ALIGNMENT
        return None


class Neighbours:
    """Memory of other processes that is mapped here, each until its process ends. Safe from any thread."""

    def __init__(self) -> None:
        self._machine = machine()
        self._lock = Lock()
        self._mapped: dict[Address, Memory] = {}
        self._unreachable: set[Address] = set()

    def __len__(self) -> int:
        return len(self._mapped)

    def reaches(self, place: Place) -> bool:
        """Whether what is there can be viewed here; it is mapped, if it can be."""
        return place.machine == self._machine and self._reach(place.address) is not None

    def view(self, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """View a tensor of another process; None if it cannot be reached: its process is gone, or another machine's.

        What it says after its process has given the place to something else is not defined: the caller holds a
        reference that keeps it there.
        """
        memory = self._reach(place.address) if place.machine == self._machine else None
        if memory is None:
            return None
        return memory.tensor(place.offset, prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _reach(self, address: Address) -> Memory | None:
        with self._lock:
            memory = self._mapped.get(address)
            if memory is not None or address in self._unreachable:
                return memory
            try:
                process, memory = _open(address)
            except ProcessLookupError:
                return None
            except (OSError, RuntimeError, ImportError) as error:
                logger.warning("KV of process %d goes over the network, it cannot be mapped: %s", address.pid, error)
                self._unreachable.add(address)
                return None
            self._mapped[address] = memory
            Thread(target=self._forget_at_end, args=(address, process), name="kv-neighbour", daemon=True).start()
            return memory

    def _forget_at_end(self, address: Address, process: int) -> None:
        """Wait for the end of a process; what views of its memory are left keep it until they are gone."""
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.poll()
        os.close(process)
        with self._lock:
            del self._mapped[address]


def _open(address: Address) -> tuple[int, Memory]:
    """A process, as a file descriptor, and its memory.

    Raises:
        ProcessLookupError: it has ended.
        OSError, RuntimeError: its memory cannot be mapped.
    """
    # First: it names this very process, also when the number is given to another one later.
    process = os.pidfd_open(address.pid)
    try:
        return process, address.open()
    except BaseException:
        os.close(process)
        raise
