"""Files of memory that this process has mapped, as Linux tells of them."""

import ctypes
import mmap
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)


def mappings(prefix: str) -> list[range]:
    """Addresses at which this process has mapped files whose path begins so, for reading and writing."""
    # Not line by line: a process with CUDA has thousands, and other threads would wait for the interpreter.
    lines, path, found = Path("/proc/self/maps").read_bytes(), b" " + prefix.encode(), []
    at = lines.find(path)
    while at >= 0:
        addresses, access, *_ = lines[lines.rfind(b"\n", 0, at) + 1 : at].split()
        if access.startswith(b"rw"):
            first, last = (int(part, 16) for part in addresses.split(b"-"))
            found.append(range(first, last))
        at = lines.find(path, at + 1)
    return found


def is_written(address: int) -> bool:
    """Whether the page at this address of a mapped file has its memory: somebody, in any process, has written to it."""
    page = ctypes.c_void_p(address // mmap.PAGESIZE * mmap.PAGESIZE)
    has_memory = ctypes.c_ubyte()
    failed = _LIBC.mincore(page, ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(has_memory))
    return not failed and bool(has_memory.value & 1)
