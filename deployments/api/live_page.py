"""The files of the folder `live/`, of which the live page is made: read once, the same for everybody.

They tell nothing of a service but whether it has keys; the page's numbers are another route, `/live`. `pages.py` serves
both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing is loaded or asked elsewhere, and nothing runs that is not one of these files, whatever a model may say.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, and the headers that it is served with."""

    body: bytes
    headers: Mapping[str, str]


def _asset(name: str, body: bytes) -> Asset:
    headers = {
        "content-type": _TYPES[PurePath(name).suffix],
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",  # asked for again, by its tag: a new release has other files
        "etag": f'"{sha256(body).hexdigest()[:16]}"',
    }
    return Asset(body, headers)


def _read() -> dict[str, Asset]:
    found = (files(__package__) / "live").iterdir()
    return {file.name: _asset(file.name, file.read_bytes()) for file in found}


ASSETS = _read()
# It refers to the others by where they are, seen from the root.
PAGE = ASSETS.pop("page.html")
# Where the service has keys: the page asks people for one before it asks for numbers.
PAGE_WITH_KEYS = _asset("page.html", PAGE.body.replace(b"<html ", b"<html data-needs-key ", 1))
