"""Which pages of other origins may use the API from a browser, what they may send and read. `http.py` installs it."""

import re
from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from deployments.api.asgi import REQUEST_ID_HEADER

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"https?://[a-z0-9._-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")
_READABLE = (
    REQUEST_ID_HEADER,
    "retry-after",
    "www-authenticate",
    *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
)


def check_origin(origin: str) -> str:
    """Return an origin as browsers send it, or `*`.

    Raises:
        ValueError: it is neither.
    """
    if origin != ANY_ORIGIN and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{origin!r} must be an origin (https://chat.example.com, with no path and in lower case) or *"
        )
    return origin


def build_cors(origins: Sequence[str]) -> Middleware:
    """What answers browsers that ask before they send (OPTIONS), and lets pages of these origins read answers.

    Without cookies: callers say who they are by a header that their page has to know.
    """
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),  # OpenAI's client sends some of its own
        expose_headers=_READABLE,
    )
