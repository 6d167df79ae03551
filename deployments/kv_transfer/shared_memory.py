"""Memory that other processes of the same machine can map: anonymous files on CPUs, CUDA IPC on GPUs.

Nothing has a name in a file system, so nothing is left behind by a process that is killed. Knows nothing of Ray or KV.
"""

import mmap
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

# The first page of a file says that it is the one meant: the number of a dead process may be another's by now.
_HEADER_BYTES = 4096
_TOKEN_BYTES = 16


class Memory(Protocol):
    """Bytes of one's own, or of another process."""

    def tensor(self, offset: int, nbytes: int, on_freed: Callable[[], object] | None = None) -> Tensor:
        """View a stretch: (nbytes,) uint8. The memory stays mapped while any view is there.

        Args:
            offset: of the first byte.
            nbytes: of the stretch, at least 1.
            on_freed: called from whichever thread drops the last view of it; must not block.
        """
        ...


class Address(Protocol):
    """How to map memory in another process of the machine; can be pickled, compared and hashed."""

    @property
    def pid(self) -> int:
        """The process that owns it."""
        ...

    def open(self) -> Memory:
        """Map it here.

        Raises:
            OSError, RuntimeError: it is gone, or may not be mapped by this process.
        """
        ...


class OwnMemory(Memory, Protocol):
    """Memory that this process has made for others to map."""

    @property
    def address(self) -> Address: ...

    @property
    def data_ptr(self) -> int:
        """Address of the first byte in this process."""
        ...


def create_memory(nbytes: int, device: str) -> OwnMemory:
    """Make memory that others can map.

    Args:
        nbytes: its size; on a CPU pages are taken as they are written to.
        device: `cpu` or `cuda`, the process's first GPU.

    Raises:
        OSError, RuntimeError: there is not so much.
    """
    return DeviceMemory.create(nbytes) if device == "cuda" else HostMemory.create(nbytes)


def machine() -> str:
    """Processes for which this is equal can map each other's memory: one kernel, and one space of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


@dataclass(frozen=True, slots=True)
class HostAddress:
    """An anonymous file of another process.

    Attributes:
        pid: the process.
        fd: the file's number there.
        nbytes: size without the header.
        token: what the header says.
    """

    pid: int
    fd: int
    nbytes: int
    token: bytes

    def open(self) -> "HostMemory":
        """See `Address`."""
        fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != _HEADER_BYTES + self.nbytes or os.pread(fd, _TOKEN_BYTES, 0) != self.token:
                raise FileNotFoundError(f"file {self.fd} of process {self.pid} is another one by now")
            return HostMemory(self, mmap.mmap(fd, _HEADER_BYTES + self.nbytes))
        finally:
            os.close(fd)


class HostMemory:
    """A mapped file; see `Memory`."""

    def __init__(self, address: HostAddress, mapped: mmap.mmap) -> None:
        self.address = address
        self._mapped = mapped

    @classmethod
    def create(cls, nbytes: int) -> "HostMemory":
        """Make the file, which lives as long as this process."""
        fd = os.memfd_create("kvrelay")
        os.ftruncate(fd, _HEADER_BYTES + nbytes)
        token = os.urandom(_TOKEN_BYTES)
        os.pwrite(fd, token, 0)
        return cls(HostAddress(os.getpid(), fd, nbytes, token), mmap.mmap(fd, _HEADER_BYTES + nbytes))

    @property
    def data_ptr(self) -> int:
        return torch.frombuffer(self._mapped, dtype=torch.uint8, offset=_HEADER_BYTES).data_ptr()

    def tensor(self, offset: int, nbytes: int, on_freed: Callable[[], object] | None = None) -> Tensor:
        """See `Memory`."""
        # The tensor's storage keeps the slice, and the slice the mapping.
        slice_ = memoryview(self._mapped)[_HEADER_BYTES + offset : _HEADER_BYTES + offset + nbytes]
        if on_freed is not None:
            weakref.finalize(slice_, on_freed).atexit = False
        return torch.frombuffer(slice_, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """Memory of another process's GPU, which may be this one's GPU too.

    Attributes:
        pid: the process.
        handle: CUDA's handle of the allocation.
        nbytes: size of the allocation.
    """

    pid: int
    handle: bytes
    nbytes: int

    def open(self) -> "DeviceMemory":
        """See `Address`; memory of another GPU is reached over NVLink or PCIe, if they allow it."""
        from cupy.cuda import runtime

        pointer = runtime.ipcOpenMemHandle(self.handle, runtime.cudaIpcMemLazyEnablePeerAccess)
        memory = DeviceMemory(self, pointer)
        weakref.finalize(memory, runtime.ipcCloseMemHandle, pointer).atexit = False
        return memory


class _Stretch:
    """Lives as long as the storage of the tensors on a stretch of a GPU's memory, and keeps that mapped."""

    def __init__(self, memory: "DeviceMemory") -> None:
        self.memory = memory


class DeviceMemory:
    """One allocation on a GPU; see `Memory`."""

    def __init__(self, address: DeviceAddress, data_ptr: int) -> None:
        self.address = address
        self.data_ptr = data_ptr

    @classmethod
    def create(cls, nbytes: int) -> "DeviceMemory":
        """Allocate apart from torch's pool, whose allocations hold memory of others too."""
        from cupy.cuda import runtime

        pointer = runtime.malloc(nbytes)
        return cls(DeviceAddress(os.getpid(), runtime.ipcGetMemHandle(pointer), nbytes), pointer)

    def tensor(self, offset: int, nbytes: int, on_freed: Callable[[], object] | None = None) -> Tensor:
        """See `Memory`."""
        import cupy

        stretch = _Stretch(self)
        if on_freed is not None:
            weakref.finalize(stretch, on_freed).atexit = False
        # The device through which it is reached here; the one it lies on may not be visible to this process.
        device = torch.cuda.current_device()
        unowned = cupy.cuda.UnownedMemory(self.data_ptr + offset, nbytes, stretch, device)
        array: Any = cupy.ndarray(nbytes, dtype=cupy.uint8, memptr=cupy.cuda.MemoryPointer(unowned, 0))
        tensor: Tensor = from_dlpack(array)
        return tensor
