"""Puts the parts of a call one after the other, in seconds since it arrived, as its receipt tells them.

A receipt has durations by the clocks of several machines; here they are laid on that of the ingress, which knows when
it sent a request to a decode replica and when the first token was back. What lies between the parts are the ways
between the processes. Each part lies within the one that it is a part of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from deployments.api.receipts import AttemptForm, CallReceipt, EngineReceipt

Value = str | float | int | bool
# Of an engine, told where there are any.
_COUNTS: tuple[Literal["preemptions", "drafted_tokens", "accepted_tokens"], ...] = (
    "preemptions",
    "drafted_tokens",
    "accepted_tokens",
)


@dataclass(frozen=True, slots=True)
class Part:
    """Something that took its time.

    Attributes:
        name: what it is.
        begin_s: since the arrival of the call.
        end_s: likewise.
        values: what is known of it.
        parts: of this one.
        error: why it failed; empty: it did not.
    """

    name: str
    begin_s: float
    end_s: float
    values: Mapping[str, Value] = field(default_factory=dict)
    parts: Sequence["Part"] = ()
    error: str = ""


def lay_out(receipt: CallReceipt, seconds: float) -> list[Part]:
    """The parts of a call.

    Args:
        receipt: of the call.
        seconds: from its arrival to its end.
    """
    parts = [_part("ingress", 0.0, receipt["ingress_s"], (0.0, seconds))]
    for choice in receipt["choices"]:
        attempts = choice["attempts"]
        ends = [*(attempt["sent_s"] for attempt in attempts[1:]), seconds]
        for attempt, end_s in zip(attempts, ends, strict=False):
            parts.append(_lay_out_attempt(choice["index"], attempt, min(end_s, seconds)))
    return parts


def _lay_out_attempt(choice: int, attempt: AttemptForm, end_s: float) -> Part:
    whole = (min(attempt["sent_s"], end_s), end_s)
    values: dict[str, Value] = {"choice": choice, "num_tokens": attempt["num_tokens"]}
    values |= _values_of(attempt["decode"])
    parts = list(_parts_of(attempt, whole))
    return _part("attempt", *whole, whole, values, parts, attempt["error"] or "")


def _parts_of(attempt: AttemptForm, whole: tuple[float, float]) -> Iterator[Part]:
    decode, sent_s = attempt["decode"], attempt["sent_s"]
    queued_s = decode.get("queued_s")
    if queued_s is not None:
        yield _part("decode.queue", sent_s, sent_s + queued_s, whole)
    first_token_s = attempt["first_token_s"]
    first_s = None if first_token_s is None else sent_s + first_token_s
    for prefill in attempt["prefill"]:
        if "error" in prefill:  # when, nobody says
            yield _part("prefill", sent_s, sent_s, whole, _values_of(prefill), error=prefill["error"])
        elif first_s is not None:
            yield _prefill(prefill, first_s, whole)
    if all("error" in prefill for prefill in attempt["prefill"]) and queued_s is not None:
        begin_s = sent_s + queued_s + decode.get("awaited_s", 0.0)
        yield _part("prefill", begin_s, begin_s + decode.get("computing_s", 0.0), whole, _values_of(decode))
    if first_s is None:
        return
    if (handoff := attempt["handoff"]) is not None:
        values = {"bytes": handoff["bytes"], "hidden_s": handoff["hidden_s"], "exposed_s": handoff["exposed_s"]}
        yield _part("handoff", first_s - handoff["hidden_s"], first_s + handoff["exposed_s"], whole, values)
    yield _part("decode", first_s, whole[1], whole, _values_of(decode))


def _prefill(prefill: EngineReceipt, first_s: float, whole: tuple[float, float]) -> Part:
    """Of a prefill engine: it ended as its first token came; the way of that is part of it."""
    computing_s = prefill.get("computing_s", 0.0)
    begin_s = first_s - computing_s - prefill.get("queued_s", 0.0)
    outer = _part("prefill", begin_s, first_s, whole, _values_of(prefill))
    within = (outer.begin_s, outer.end_s)
    parts = [
        _part("prefill.queue", begin_s, first_s - computing_s, within),
        _part("prefill.compute", first_s - computing_s, first_s, within),
    ]
    return replace(outer, parts=parts)


def _values_of(engine: EngineReceipt) -> dict[str, Value]:
    values: dict[str, Value] = {"replica": engine["replica"], "reason": engine["reason"]}
    if (cached := engine.get("cached_tokens")) is not None:
        values["cached_tokens"] = cached
    for name in _COUNTS:
        if count := engine.get(name):
            values[name] = count
    return values


def _part(
    name: str,
    begin_s: float,
    end_s: float,
    within: tuple[float, float],
    values: Mapping[str, Value] | None = None,
    parts: Sequence[Part] = (),
    error: str = "",
) -> Part:
    """A part, as far as it lies within another."""
    low_s, high_s = within
    begin_s = min(max(begin_s, low_s), high_s)
    return Part(name, begin_s, min(max(end_s, begin_s), high_s), values or {}, parts, error)
