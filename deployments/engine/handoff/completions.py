"""Tells when a device has done something, without anybody else waiting for it."""

from collections import deque
from collections.abc import Callable
from threading import Lock, Thread

import torch


class Completions:
    """Calls back behind events of one stream. Methods are for one thread; calls come from that one or from another."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._awaited: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()
        self._is_waiting = False

    def call_after(self, event: torch.cuda.Event | None, call: Callable[[], None]) -> None:
        """Call once the event has happened, behind the calls of events before it; None: at once.

        Args:
            event: recorded on the same stream as those before it.
            call: must not block.
        """
        if event is None:
            call()
            return
        with self._lock:
            self._awaited.append((event, call))
            if self._is_waiting:
                return
            self._is_waiting = True
        # Lives as long as there is something to wait for, so that an engine that is dropped leaves nothing behind.
        Thread(target=self._wait, name="kv-completions", daemon=True).start()

    def _wait(self) -> None:
        while True:
            with self._lock:
                if not self._awaited:
                    self._is_waiting = False
                    return
                event, call = self._awaited.popleft()
            event.synchronize()
            call()
