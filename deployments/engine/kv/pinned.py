"""Memory of the host that a GPU reads by itself: pinned piece by piece, and found again by address."""

from bisect import bisect_right, insort
from collections.abc import Callable
from operator import itemgetter
from threading import Lock

import torch

from deployments.errors import PinError


def _register(address: int, num_bytes: int) -> None:
    _check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))


def _unregister(address: int) -> None:
    _check(torch.cuda.cudart().cudaHostUnregister(address))


def _check(code: int) -> None:
    try:
        torch.cuda.check_error(code)
    except torch.cuda.CudaError as error:
        raise PinError(str(error)) from error


class PinnedMemory:
    """See the module. Safe from any thread.

    Args:
        register: pins bytes from an address on; raises `PinError`.
        unregister: takes that back.
    """

    def __init__(
        self, register: Callable[[int, int], None] = _register, unregister: Callable[[int], None] = _unregister
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._lock = Lock()
        self._pieces: list[tuple[int, int]] = []  # where each begins and ends, in order

    def pin(self, address: int, num_bytes: int) -> None:
        """Pin a piece that overlaps no other one; it has to stay mapped until `unpin`.

        Raises:
            PinError: the driver refuses.
        """
        self._register(address, num_bytes)
        with self._lock:
            insort(self._pieces, (address, address + num_bytes))

    def cut(self, address: int, num_bytes: int) -> list[int] | None:
        """Sizes of the parts of this memory that lie in one piece each; None if some of it is not pinned.

        One transfer does not read two pieces.
        """
        sizes, at, end = [], address, address + num_bytes
        with self._lock:
            index = bisect_right(self._pieces, address, key=itemgetter(0)) - 1
            while at < end:
                start, stop = self._pieces[index] if 0 <= index < len(self._pieces) else (end, end)
                if not start <= at < stop:
                    return None
                sizes.append(min(stop, end) - at)
                at, index = stop, index + 1
        return sizes

    def unpin(self) -> None:
        """Let go of all of it; nothing reads it any more."""
        with self._lock:
            while self._pieces:
                self._unregister(self._pieces.pop()[0])
