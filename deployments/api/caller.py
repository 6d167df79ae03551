"""Who calls and how urgent it is, from a request's headers.

Owns that an API key goes no further than this file: the rest of the service sees a hash of it. `exchange.py` calls it.
"""

import hashlib
import reprlib
from dataclasses import dataclass

from starlette.datastructures import Headers

from deployments.api.receipts import HEADER as RECEIPT_HEADER
from deployments.errors import InvalidRequestError
from deployments.messages import Priority

PRIORITY_HEADER = "x-priority"
TRACE_HEADERS = ("traceparent", "tracestate")
# What all callers without a key have in common.
ANONYMOUS = b""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        key: tells callers apart; a hash of the API key, or `ANONYMOUS`.
        priority: of the call.
        wants_receipt: the caller wants to know what became of the call.
    """

    key: bytes
    priority: Priority
    wants_receipt: bool


def read_caller(headers: Headers, usual: Priority = Priority.NORMAL) -> Caller:
    """Read the priority, and the key from `Authorization: Bearer` or else from `x-api-key`.

    Args:
        headers: of the request.
        usual: its priority if it says none.

    Raises:
        InvalidRequestError: there is no such priority, or the wish for a receipt is not clear.
    """
    return Caller(read_key(headers), _read_priority(headers, usual), _read_wish(headers))


def read_key(headers: Headers) -> bytes:
    """SHA-256 of the API key, or `ANONYMOUS`; of two headers of one name none counts, for who is meant?"""
    scheme, _, token = _only(headers, "authorization").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else ""
    key = key or _only(headers, "x-api-key")
    # As they were sent: Starlette makes a character of each byte.
    return hashlib.sha256(key.encode("latin-1")).digest() if key else ANONYMOUS


def read_trace_headers(headers: Headers) -> dict[str, str]:
    """What says of which trace a call is part (W3C Trace Context); whoever traces judges it."""
    return {name: ",".join(given) for name in TRACE_HEADERS if (given := headers.getlist(name))}


def _only(headers: Headers, name: str) -> str:
    given = headers.getlist(name)
    return given[0].strip() if len(given) == 1 else ""


def _read_wish(headers: Headers) -> bool:
    wish = headers.get(RECEIPT_HEADER, "0").strip()
    if wish not in ("0", "1"):
        message = f"the header {RECEIPT_HEADER} is {reprlib.repr(wish)}, must be 0 or 1"
        raise InvalidRequestError(message, RECEIPT_HEADER)
    return wish == "1"


def _read_priority(headers: Headers, usual: Priority) -> Priority:
    name = headers.get(PRIORITY_HEADER, usual.name)
    try:
        return Priority[name.strip().upper()]
    except KeyError:
        known = ", ".join(priority.name.lower() for priority in reversed(Priority))
        raise InvalidRequestError(
            f"the header {PRIORITY_HEADER} is {reprlib.repr(name)}, must be one of {known}", PRIORITY_HEADER
        ) from None
