"""What a client sees of the system, told to whoever keeps metrics and logs. Knows no library of theirs.

`exchange.py` reports; the ingress passes an `Observer` that records.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Protocol

from deployments.api.choices import TextEvent
from deployments.api.receipts import CallReceipt


class Outcome(StrEnum):
    """How a call ended."""

    OK = "ok"
    INVALID = "invalid"  # the request was at fault
    OVERLOADED = "overloaded"  # refused by admission
    FAILED = "failed"  # the system was at fault
    STALLED = "stalled"  # the client did not read
    ABORTED = "aborted"  # the client left, or the server stops


@dataclass(frozen=True, slots=True)
class EndedCall:
    """A call to a generate endpoint that is over. Nothing of what was said in it.

    Attributes:
        call_id: the id of the response.
        request_id: what `X-Request-Id` said.
        path: of the endpoint.
        outcome: how it ended.
        status: that was sent; None: nothing was.
        began_s: when it arrived, Unix time.
        seconds: from then until it was over.
        ttft_s: from then until the first output was sent, or collected; None: there was none.
        key: the name of the caller's key; empty: there are no keys.
        user: who asked, as the caller says.
        labels: what else the caller says of the call.
        num_prompt_tokens: in all prompts.
        num_cached_tokens: of these, that nobody computed.
        num_generated_tokens: in all samples.
        finish_reasons: of the samples that were generated to their end.
        trace_headers: `traceparent` and `tracestate` of the request, as they came.
        receipt: what became of it; None: it never came to the pools, or nobody wanted to know.
    """

    call_id: str
    request_id: str
    path: str
    outcome: Outcome
    status: HTTPStatus | None
    began_s: float
    seconds: float
    ttft_s: float | None
    key: str
    user: str | None
    labels: Mapping[str, object]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    finish_reasons: tuple[str, ...]
    trace_headers: Mapping[str, str]
    receipt: CallReceipt | None


class Observer(Protocol):
    """Called from the event loop, so it must be quick; an error in it fails the request.

    Attributes:
        wants_receipts: of every call, for `call_ended`; else of those alone whose callers ask for one.
    """

    @property
    def wants_receipts(self) -> bool: ...

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

    def call_ended(self, call: EndedCall) -> None:
        """The same in full, when its receipt is whole: a moment later."""
        ...


class SilentObserver:
    """Records nothing."""

    wants_receipts = False

    def request_started(self) -> None: ...

    def request_denied(self, reason: str) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def inter_token(self, seconds: float, num_tokens: int) -> None: ...

    def request_finished(self, outcome: Outcome) -> None: ...

    def call_ended(self, call: EndedCall) -> None: ...


class Stopwatch:
    """Times the outputs of one call, each choice by itself.

    Outputs without text yet count when they come. In a first output of several tokens, those after the first have no
    gap and do not count.

    Attributes:
        on_first: called with the index of a choice whose first output was sent.
        ttft_s: from the arrival of the call until the first of all its outputs was sent; None: none was.
    """

    def __init__(self, observer: Observer) -> None:
        self.on_first: Callable[[int], None] = lambda choice: None
        self.ttft_s: float | None = None
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
            ttft_s = now_s - self._arrival_s
            if self.ttft_s is None:
                self.ttft_s = ttft_s
            self._observer.first_token(ttft_s)
            self.on_first(event.choice)
        else:
            num_tokens = len(event.token_ids)
            self._observer.inter_token((now_s - last_s) / num_tokens, num_tokens)
        self._last_s[event.choice] = now_s
