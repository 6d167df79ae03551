"""Middleware in front of every route: who may come in, with which key, and how often.

Owns which paths need no key, and that all others do. Only installed where there are keys. `keys.py` knows whose a key
is, `accounts.py` counts; a request that passes finds its account in `scope["state"]["account"]`.
"""

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api import sse
from deployments.api.accounts import Account, RateLimitedError
from deployments.api.caller import ANONYMOUS, read_key
from deployments.api.failures import failure_of
from deployments.api.keys import ForbiddenError, KeyRing, UnauthorizedError
from deployments.api.live_page import ASSETS

# Load balancers ask the first two, which tell no more than whether the service works. The others tell no more
# than whether there are keys, and a browser that opens them has none: the live page asks for one, to show anything.
OPEN_PATHS = frozenset({"/health", "/ping", "/docs", "/openapi.json", "/", *(f"/live/{name}" for name in ASSETS)})
# These tell of everybody's calls.
METRICS_PATHS = frozenset({"/metrics", "/live"})


class Guard:
    """The middleware.

    Args:
        app: what is guarded.
        keys: whose a key is.
        refused: told why a request was not let in, by the name of its status: `unauthorized`, `too_many_requests`.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, refused: Callable[[str], None]) -> None:
        self._app = app
        self._keys = keys
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path_of(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        account: Account | None = None

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and account is not None:
                MutableHeaders(scope=message).update(account.headers())
            await send(message)

        try:
            account = self._identify(Headers(scope=scope))
            if _path_of(scope) in METRICS_PATHS and not account.terms.reads_metrics:
                raise ForbiddenError(f"the key {account.name!r} may not read the metrics of the service")
            account.take_request()
        except (UnauthorizedError, ForbiddenError, RateLimitedError) as error:
            failure = failure_of(error)
            self._refused(failure.status.name.lower())
            response = Response(sse.to_json(failure.body()), failure.status, failure.headers(), "application/json")
            await response(scope, receive, send_with_limits)
            return
        scope["state"]["account"] = account
        await self._app(scope, receive, send_with_limits)

    def _identify(self, headers: Headers) -> Account:
        digest = read_key(headers)
        if digest == ANONYMOUS:
            raise UnauthorizedError("an API key is needed: send one header `Authorization: Bearer KEY`")
        account = self._keys.find(digest)
        if account is None:
            raise UnauthorizedError("the API key is not valid", is_wrong=True)
        return account


def _path_of(scope: Scope) -> str:
    """The path as routes see it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
