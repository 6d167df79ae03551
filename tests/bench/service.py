"""The service that a benchmark measures, for as long as it does."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from app.local import down, up
from app.local_process import RunFolder


@contextmanager
def serving(folder: RunFolder, port: int, arguments: list[str], app: str = "app:graph") -> Iterator[None]:
    """Bring the service up, and down again whatever happens, also where `kill` or `timeout` ends the benchmark."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        up(folder, app, port, None, 600, arguments)
        try:
            yield
        finally:
            down(folder)
    finally:
        signal.signal(signal.SIGTERM, before)
