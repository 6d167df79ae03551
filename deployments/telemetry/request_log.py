"""One line for each call that is over: who asked, what it cost, and where it was served. No text of it.

The lines are Ray Serve's: its format, its files, and, where JSON is set, its fields, of which each figure is one.
"""

import json
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from deployments.api.observer import EndedCall
from deployments.api.receipts import AttemptForm, CallReceipt, EngineReceipt

# Ray Serve's own: it writes what this one says, and of others warnings alone.
logger = logging.getLogger("ray.serve")

# One engine that dies may be lost by a hundred samples, each several times; more kinds of errors say nothing new.
_MAX_ERRORS = 4
# Where one of these is in a value, it is no word.
_QUOTED = frozenset(" \"'\\=")


def log_call(call: EndedCall) -> None:
    """Write its line."""
    fields = fields_of(call)
    logger.info("%s", " ".join(f"{name}={_shown(value)}" for name, value in fields.items()), extra={"call": fields})


def fields_of(call: EndedCall) -> dict[str, object]:
    """What is told of a call, by name; what is not known is left out.

    Several samples have the times of the one that took longest, and the names of all replicas.
    """
    fields: dict[str, object] = {
        "call": call.call_id,
        "path": call.path,
        "status": None if call.status is None else int(call.status),
        "outcome": str(call.outcome),
        "seconds": _rounded(call.seconds),
        "ttft_s": _rounded(call.ttft_s),
        "prompt_tokens": call.num_prompt_tokens,
        "cached_tokens": call.num_cached_tokens,
        "generated_tokens": call.num_generated_tokens,
        **({} if call.receipt is None else _fields_of_receipt(call.receipt)),
        "key": call.key or None,
        "user": call.user,
        "labels": call.labels or None,
        "request_id": call.request_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _fields_of_receipt(receipt: CallReceipt) -> dict[str, object]:
    attempts = [attempt for choice in receipt["choices"] for attempt in choice["attempts"]]
    decodes = [attempt["decode"] for attempt in attempts]
    prefills = [prefill for attempt in attempts for prefill in attempt["prefill"]]
    handoffs = [attempt["handoff"] for attempt in attempts if attempt["handoff"] is not None]
    return {
        "ingress_s": _rounded(receipt["ingress_s"]),
        "decode": _names(decodes),
        "decode_queued_s": _longest(decodes, "queued_s"),
        "decode_awaited_s": _longest(decodes, "awaited_s"),
        "decode_computing_s": _longest(decodes, "computing_s"),
        "next_token_s": _longest(decodes, "next_token_s"),
        "prefill": _names(prefills),
        "prefill_queued_s": _longest(prefills, "queued_s"),
        "prefill_computing_s": _longest(prefills, "computing_s"),
        "handoff_bytes": sum(handoff["bytes"] for handoff in handoffs) or None,
        "hidden_s": _rounded(max((handoff["hidden_s"] for handoff in handoffs), default=None)),
        "exposed_s": _rounded(max((handoff["exposed_s"] for handoff in handoffs), default=None)),
        "preemptions": _sum_of([*decodes, *prefills], "preemptions"),
        "drafted_tokens": _sum_of(decodes, "drafted_tokens"),
        "accepted_tokens": _sum_of(decodes, "accepted_tokens"),
        "resumed": sum(len(choice["attempts"]) - 1 for choice in receipt["choices"] if choice["attempts"]) or None,
        "errors": list(islice(dict.fromkeys(_errors(attempts)), _MAX_ERRORS)) or None,
    }


def _names(engines: list[EngineReceipt]) -> str | None:
    """Of the replicas, each once; None: there are none, or nobody said which."""
    return ",".join(dict.fromkeys(engine["replica"] for engine in engines if engine["replica"])) or None


def _longest(engines: list[EngineReceipt], name: str) -> float | None:
    times = [seconds for engine in engines if isinstance(seconds := engine.get(name), float)]
    return _rounded(max(times, default=None))


def _sum_of(
    engines: list[EngineReceipt], name: Literal["preemptions", "drafted_tokens", "accepted_tokens"]
) -> int | None:
    """None: nothing."""
    return sum(engine.get(name, 0) for engine in engines) or None


def _errors(attempts: list[AttemptForm]) -> Iterator[str]:
    for attempt in attempts:
        yield from (prefill["error"] for prefill in attempt["prefill"] if "error" in prefill)
        if attempt["error"] is not None:
            yield attempt["error"]


def _rounded(seconds: float | None) -> float | None:
    """To a tenth of a millisecond: below that clocks and threads say nothing."""
    return None if seconds is None else round(seconds, 4)


def _shown(value: object) -> str:
    """As one word of ASCII, or between double quotes as JSON has it, which logfmt and shells split as one value."""
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    is_word = text and text.isascii() and text.isprintable() and not set(text) & _QUOTED
    # JSON leaves the last control character of ASCII as it is.
    return text if is_word else json.dumps(text).replace("\x7f", "\\u007f")
