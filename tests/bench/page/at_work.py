"""Threads that keep a service at work while it is looked at."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Shift:
    """What the threads of one piece of work share.

    Attributes:
        is_over: set when they are to end.
    """

    is_over: threading.Event = field(default_factory=threading.Event)
    _begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def begin(self) -> None:
        """Said once by each thread, when it is at work."""
        self._begun.release()

    def wait_for_all(self, num_threads: int, timeout_s: float) -> None:
        """Return when so many are at work.

        Raises:
            TimeoutError: some are not in time.
        """
        for number in range(num_threads):
            if not self._begun.acquire(timeout=timeout_s):
                raise TimeoutError(f"{number} of {num_threads} are at work, and no other within {timeout_s:g} s")


# What one thread does until the shift is over; it is told its number.
Work = Callable[[int, Shift], None]


@contextmanager
def at_work(num_threads: int, work: Work, timeout_s: float = 60.0) -> Iterator[None]:
    """So many do this meanwhile, all of them from the start on.

    Args:
        num_threads: how many.
        work: what each does.
        timeout_s: for the next of them to be at work.

    Raises:
        TimeoutError: not all have begun in time.
        Exception: what one of them raised; after what the body raises, of which it may be the reason.
    """
    shift = Shift()
    with ThreadPoolExecutor(max(1, num_threads)) as threads:
        working = [threads.submit(work, number, shift) for number in range(num_threads)]
        try:
            shift.wait_for_all(num_threads, timeout_s)
            yield
        finally:
            shift.is_over.set()
            wait(working)
            for done in working:
                done.result()
