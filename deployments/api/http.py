"""The HTTP application: its routes, the pages that only look, and errors outside a call.

Only it, `exchange.py`, which has the calls, and `failures.py`, which has the errors, know status codes. The ingress
builds the app with `build_app` and lets Ray Serve, or any ASGI server, run it.
"""

import reprlib
import time
from collections.abc import Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.api import sse
from deployments.api.answers import ChatAnswer, CompletionAnswer, describe_model
from deployments.api.asgi import REQUEST_ID_HEADER, ClosesUnread, RequestIds
from deployments.api.backend import Backend
from deployments.api.body import MAX_BODY_BYTES
from deployments.api.calls import ModelNotFoundError, read_chat, read_completion
from deployments.api.cors import build_cors
from deployments.api.exchange import Endpoint, Service
from deployments.api.failures import failure_of
from deployments.api.guard import Guard
from deployments.api.keys import KeyRing
from deployments.api.observer import Observer, SilentObserver
from deployments.api.text import TextCodec
from deployments.errors import KvRelayError
from deployments.messages import ModelInfo

# Of a request; what takes longer is refused with 408. 4 MiB in it are 0.6 Mbit/s.
BODY_TIMEOUT_S = 60.0
_METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_app(
    backend: Backend,
    codec: TextCodec,
    info: ModelInfo,
    *,
    observer: Observer | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
    server_sends_ids: bool = False,
    keys: KeyRing | None = None,
    cors_origins: Sequence[str] = (),
) -> Starlette:
    """Build the application.

    Args:
        backend: runs the requests.
        codec: the tokenizer of the model.
        info: the one model that is served.
        observer: told of the calls and their timing.
        max_body_bytes: a longer request body is refused with 413.
        body_timeout_s: a request body that takes longer to arrive is refused with 408.
        server_sends_ids: see `RequestIds`.
        keys: those that let in; None: everybody is.
        cors_origins: whose pages may use the API from a browser.
    """
    observer = observer or SilentObserver()
    service = Service(backend, codec, info, observer, max_body_bytes, body_timeout_s)
    pages = _Pages(backend, info)
    middleware = [Middleware(RequestIds, is_sent_by_server=server_sends_ids), Middleware(ClosesUnread)]
    if cors_origins:  # before keys: a browser asks without one
        middleware.append(build_cors(cors_origins))
    if keys is not None:
        middleware.append(Middleware(Guard, keys=keys, refused=observer.request_denied))
    return Starlette(
        routes=[
            Route("/v1/completions", Endpoint(service, "cmpl", read_completion, CompletionAnswer), methods=["POST"]),
            Route("/v1/chat/completions", Endpoint(service, "chatcmpl", read_chat, ChatAnswer), methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{model_id:path}", pages.model),
            Route("/health", pages.health),
            Route("/metrics", pages.metrics),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _refuse, KvRelayError: _refuse, Exception: _refuse},
    )


class _Pages:
    """The routes that only look."""

    def __init__(self, backend: Backend, info: ModelInfo) -> None:
        self._backend = backend
        self._info = info
        self._model = describe_model(info, created=int(time.time()))

    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        model_id = request.path_params["model_id"]
        if model_id != self._info.name:
            shown = reprlib.repr(model_id)
            raise ModelNotFoundError(f"the model {shown} does not exist; {self._info.name!r} does", "model")
        return _json(self._model)

    async def health(self, _: Request) -> Response:
        is_healthy, reason = await self._backend.health()
        if is_healthy:
            return _json({"status": "ok"})
        return _json({"status": "unavailable", "reason": reason}, HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self, _: Request) -> Response:
        return Response(await self._backend.metrics(), headers={"content-type": _METRICS_CONTENT_TYPE})


def _refuse(request: Request, error: Exception) -> Response:
    """Answer for the routes that are no `Endpoint`: unknown paths, wrong methods, models, health, metrics."""
    failure = failure_of(error)
    request_id = request.scope["state"]["request_id"]
    failure.log(request_id, error)
    response = _json(failure.body(), failure.status)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    if request.scope["state"]["sends_id"]:
        # A 500 is sent from outside the middleware that adds the id to all other responses.
        response.headers[REQUEST_ID_HEADER] = request_id
    return response


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(sse.to_json(value), status_code=status, media_type="application/json")
