"""Says on stderr how far a benchmark is; its tables are on stdout."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_S = 30.0


def note(text: str) -> None:
    """Say it now."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def timed(what: str, seconds: float, every_s: float = EVERY_S) -> Iterator[None]:
    """Say again and again how much has passed of what takes about so long."""
    is_over, begun_s = threading.Event(), time.monotonic()

    def tell() -> None:
        while not is_over.wait(every_s):
            note(f"{what}: {time.monotonic() - begun_s:.0f} of about {seconds:.0f} s")

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield
    finally:
        is_over.set()
        teller.join()
