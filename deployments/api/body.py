"""Reads a request's body: its headers say whether it can be what the API takes. `exchange.py` and `pages.py` call it.

Owns what a body may claim to be, how long it may get and how long that may take. Knows nothing of what stands in it.
"""

import asyncio
from email.message import Message
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request

# Unless the operator says otherwise.
MAX_BODY_BYTES = 4 * 2**20
_JSON = "application/json"
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii"})


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Read the whole body.

    Raises:
        HTTPException: 400, 408, 413 or 415, with the header or the bound that was broken.
        ClientDisconnect: the client left before its end.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request, max_bytes)
    except TimeoutError:
        late = f"the body was not complete after {timeout_s:g} s"
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, late) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    _check_type(request.headers)
    too_long = HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body must be at most {max_bytes} bytes")
    if _length(request.headers) > max_bytes:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


def _length(headers: Headers) -> float:
    """What the body claims to be; 0 where it does not say."""
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        message = f"the header content-length is {shown(length)}, must be a number of bytes"
        raise HTTPException(HTTPStatus.BAD_REQUEST, message)
    return float(length)  # `int` refuses thousands of digits


def _check_type(headers: Headers) -> None:
    """Refuse what is not JSON as it stands. A body that does not say what it is counts as JSON, but not from a page.

    Forms, plain text and bodies of no type are what a page of another origin can make a browser send without asking the
    server first.
    """
    content_type = headers.get("content-type", "").strip()
    if not content_type:
        if "origin" in headers:
            _refuse("content-type", content_type, _JSON)
        content_type = _JSON
    essence = content_type.partition(";")[0].strip().lower()
    if essence != _JSON and not (essence.startswith("application/") and essence.endswith("+json")):
        _refuse("content-type", content_type, _JSON)
    # RFC 8259 knows no other. A body that says otherwise would be read as what it is not.
    if _charset(content_type) not in _CHARSETS:
        _refuse("content-type", content_type, f"{_JSON} in UTF-8")
    _check_encoding(headers.get("content-encoding", "identity"))


def _check_encoding(encoding: str) -> None:
    """Refuse a compressed body: unpacked, a few bytes could become gigabytes."""
    if encoding.strip().lower() not in ("identity", ""):
        _refuse("content-encoding", encoding, "no encoding")


def _charset(content_type: str) -> str:
    header = Message()
    header["content-type"] = content_type
    return header.get_content_charset("utf-8")


def shown(value: str) -> str:
    """What a caller wrote, as far as an error repeats it."""
    return repr(value if len(value) <= 100 else f"{value[:100]}...")


def _refuse(header: str, value: str, accepted: str) -> None:
    message = f"the header {header} is {shown(value)}, must be {accepted}"
    raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message)
