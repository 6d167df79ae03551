"""What a client sees of the system's speed, told to whoever keeps the metrics. Knows no metrics library.

`exchange.py` reports; the ingress passes an `Observer` that records.
"""

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from deployments.api.choices import TextEvent


class Outcome(StrEnum):
    """How a call ended."""

    OK = "ok"
    INVALID = "invalid"  # the request was at fault
    OVERLOADED = "overloaded"  # refused by admission
    FAILED = "failed"  # the system was at fault
    STALLED = "stalled"  # the client did not read
    ABORTED = "aborted"  # the client left, or the server stops


class Observer(Protocol):
    """Called from the event loop, so it must be quick; an error in it fails the request."""

    def request_started(self) -> None:
        """A call to a generate endpoint arrived."""
        ...

    def request_denied(self, reason: str) -> None:
        """A request was not let in for its key, or for want of one; none of the other methods hears of it."""
        ...

    def first_token(self, seconds: float) -> None:
        """TTFT of one choice: arrival of the call until its first output was sent, or collected if not streaming."""
        ...

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        """ITL: an output of `num_tokens` tokens came `num_tokens * seconds` after the one before; counts that often."""
        ...

    def request_finished(self, outcome: Outcome) -> None:
        """The call ended; exactly once per `request_started`."""
        ...


class SilentObserver:
    """Records nothing."""

    def request_started(self) -> None: ...

    def request_denied(self, reason: str) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def inter_token(self, seconds: float, num_tokens: int) -> None: ...

    def request_finished(self, outcome: Outcome) -> None: ...


class Stopwatch:
    """Times the outputs of one call, each choice by itself.

    Outputs without text yet count when they come. In a first output of several tokens, those after the first have no
    gap and do not count.

    Attributes:
        on_first: called with the index of a choice whose first output was sent.
    """

    def __init__(self, observer: Observer) -> None:
        self.on_first: Callable[[int], None] = lambda choice: None
        self._observer = observer
        self._arrival_s = time.perf_counter()
        self._last_s: dict[int, float] = {}

    def elapsed_s(self) -> float:
        """Seconds since the call arrived."""
        return time.perf_counter() - self._arrival_s

    def lap(self, event: TextEvent) -> None:
        """The event has been sent."""
        now_s = time.perf_counter()
        last_s = self._last_s.get(event.choice)
        if last_s is None:
            self._observer.first_token(now_s - self._arrival_s)
            self.on_first(event.choice)
        else:
            num_tokens = len(event.token_ids)
            self._observer.inter_token((now_s - last_s) / num_tokens, num_tokens)
        self._last_s[event.choice] = now_s
