"""What became of a call, for callers who ask and for the log. Owns its form; the backend tells the facts."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NotRequired

# Before Python 3.12 pydantic describes these alone (openapi.py).
from typing_extensions import TypedDict

from deployments.receipts import PATIENCE_S, Attempt, EngineTimes, PrefillReceipt, Receipt

HEADER = "x-kvrelay-receipt"


class EngineReceipt(TypedDict):
    """How a request spent its time at one engine, by that engine's clock; see docs/api.md."""

    replica: str
    reason: str
    queued_s: NotRequired[float]
    awaited_s: NotRequired[float]
    computing_s: NotRequired[float]
    next_token_s: NotRequired[float | None]
    cached_tokens: NotRequired[int]
    preemptions: NotRequired[int]
    drafted_tokens: NotRequired[int]
    accepted_tokens: NotRequired[int]
    error: NotRequired[str]


class HandoffForm(TypedDict):
    """KV on its way to the decode engine: while the prompt was still computed, and after that."""

    bytes: int
    hidden_s: float
    exposed_s: float


class AttemptForm(TypedDict):
    """One decode replica, and what it had done elsewhere. Sent so many seconds after the arrival of the call.

    The error says why it was lost.
    """

    decode: EngineReceipt
    prefill: list[EngineReceipt]
    handoff: HandoffForm | None
    sent_s: float
    first_token_s: float | None
    num_tokens: int
    error: str | None


class ChoiceReceipt(TypedDict):
    """Of one choice, or of one sample of `best_of`."""

    index: int
    ttft_s: float | None
    attempts: list[AttemptForm]


class CallReceipt(TypedDict):
    """Of a call: seconds from its arrival until its prompts were sent on, and what became of them."""

    ingress_s: float
    choices: list[ChoiceReceipt]


@dataclass(slots=True)
class _Choice:
    ttft_s: float | None = None
    receipt: Receipt = ()
    sent_s: list[float] = field(default_factory=list)

    def take(self, receipt: Receipt, elapsed_s: float) -> None:
        """An attempt is told of as soon as it is sent."""
        self.receipt = receipt
        self.sent_s += [elapsed_s] * (len(receipt) - len(self.sent_s))

    @property
    def is_whole(self) -> bool:
        """Whether the replica that went on to the end has said how it went."""
        return bool(self.receipt) and self.receipt[-1].decode is not None


class ReceiptKeeper:
    """What is known of one call of which somebody wants a receipt.

    Args:
        num_requests: of the call.
        elapsed_s: seconds since it arrived. It is let in now.
        on_first: told of the first output of each request, too.
    """

    def __init__(self, num_requests: int, elapsed_s: Callable[[], float], on_first: Callable[[int], None]) -> None:
        self._on_first = on_first
        self._elapsed_s = elapsed_s
        self._ingress_s = elapsed_s()
        self._choices = [_Choice() for _ in range(num_requests)]
        self._then: Callable[[], None] | None = None

    def take(self, index: int, receipt: Receipt) -> None:
        """What is known of a request now."""
        self._choices[index].take(receipt, self._elapsed_s())
        if self._is_whole():
            self._go_on()

    def call_when_whole(self, then: Callable[[], None]) -> None:
        """Call this once: when all is known, or is waited for no longer."""
        self._then = then
        if self._is_whole():
            self._go_on()
        else:
            asyncio.get_running_loop().call_later(PATIENCE_S, self._go_on)

    def _is_whole(self) -> bool:
        return all(choice.is_whole for choice in self._choices)

    def _go_on(self) -> None:
        if self._then is not None:
            then, self._then = self._then, None
            then()

    def first_token(self, index: int) -> None:
        """The first output of a request was sent, or collected."""
        self._choices[index].ttft_s = self._elapsed_s()
        self._on_first(index)

    def shape(self) -> CallReceipt:
        """As answers have it; JSON has no tuples of dataclasses."""
        choices: list[ChoiceReceipt] = [
            {"index": index, "ttft_s": choice.ttft_s, "attempts": list(map(_shape, choice.receipt, choice.sent_s))}
            for index, choice in enumerate(self._choices)
        ]
        return {"ingress_s": self._ingress_s, "choices": choices}


def _shape(attempt: Attempt, sent_s: float) -> AttemptForm:
    told = attempt.decode
    prefills = () if told is None else told.prefills
    handoff = next((one.handoff for one in prefills if one.handoff is not None), None)
    return {
        "decode": _shape_engine(attempt.replica, attempt.reason, None if told is None else told.times),
        "prefill": [_shape_prefill(one, attempt.prefill_reason or "") for one in prefills],
        "handoff": None
        if handoff is None
        else {"bytes": handoff.num_bytes, "hidden_s": handoff.hidden_s, "exposed_s": handoff.exposed_s},
        "sent_s": sent_s,
        "first_token_s": attempt.first_token_s,
        "num_tokens": attempt.num_tokens,
        "error": attempt.error or None,
    }


def _shape_prefill(receipt: PrefillReceipt, reason: str) -> EngineReceipt:
    shaped = _shape_engine(receipt.replica, reason, receipt.times)
    return {**shaped, "error": receipt.error} if receipt.error else shaped


def _shape_engine(replica: str, reason: str, times: EngineTimes | None) -> EngineReceipt:
    shaped: EngineReceipt = {"replica": replica, "reason": reason}
    if times is not None:
        shaped["queued_s"] = times.queued_s
        shaped["awaited_s"] = times.awaited_s
        shaped["computing_s"] = times.computing_s
        shaped["next_token_s"] = times.next_token_s
        shaped["cached_tokens"] = times.num_found_tokens
        shaped["preemptions"] = times.num_preemptions
        if times.num_drafted_tokens:
            shaped["drafted_tokens"] = times.num_drafted_tokens
            shaped["accepted_tokens"] = times.num_accepted_tokens
    return shaped
