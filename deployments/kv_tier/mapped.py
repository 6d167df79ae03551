"""Files of memory that this process has mapped, as Linux tells of them."""

import ctypes
import mmap

_LIBC = ctypes.CDLL(None, use_errno=True)


def mappings(prefix: str) -> list[range]:
    """Addresses at which this process has mapped files whose path begins so, for reading and writing."""
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, access, _, _, _, *path = line.split(maxsplit=5)
            if access.startswith("rw") and path and path[0].startswith(prefix):
                first, last = (int(part, 16) for part in addresses.split("-"))
                found.append(range(first, last))
    return found


def is_written(address: int) -> bool:
    """Whether the page at this address of a mapped file has its memory: somebody, in any process, has written to it."""
    page = ctypes.c_void_p(address // mmap.PAGESIZE * mmap.PAGESIZE)
    has_memory = ctypes.c_ubyte()
    failed = _LIBC.mincore(page, ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(has_memory))
    return not failed and bool(has_memory.value & 1)
