"""The HTTP application: its routes, what stands before them, and errors outside a call.

Only it, `exchange.py`, which has the calls, `pages.py`, which has the rest, and `failures.py`, which has the errors,
know status codes. The ingress
builds the app with `build_app` and lets Ray Serve, or any ASGI server, run it.
"""

from collections.abc import Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.api import sse
from deployments.api.answers import ChatAnswer, CompletionAnswer
from deployments.api.asgi import REQUEST_ID_HEADER, ClosesUnread, RequestIds
from deployments.api.backend import Backend
from deployments.api.body import MAX_BODY_BYTES, shown
from deployments.api.calls import read_chat, read_completion
from deployments.api.cors import build_cors
from deployments.api.examiners import Examiner, Here
from deployments.api.exchange import Endpoint, Service
from deployments.api.failures import failure_of
from deployments.api.grammar_check import GrammarCheck
from deployments.api.guard import Guard
from deployments.api.keys import KeyRing
from deployments.api.observer import Observer, SilentObserver
from deployments.api.pages import Pages, to_response
from deployments.api.responses.answers import ResponseAnswer
from deployments.api.responses.reading import read_response
from deployments.api.text import TextCodec
from deployments.errors import KvRelayError
from deployments.grammars import Vocabulary
from deployments.messages import ModelInfo

# Of a request; what takes longer is refused with 408. 4 MiB in it are 0.6 Mbit/s.
BODY_TIMEOUT_S = 60.0


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
    examiner: Examiner | None = None,
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
        examiner: tries grammars before engines get them; None: one in this process, which nothing can stop.
    """
    observer = observer or SilentObserver()
    examiner = examiner or Here(lambda ends: Vocabulary(codec.backend.to_str(), info.vocab_size, ends))
    service = Service(backend, codec, info, observer, max_body_bytes, body_timeout_s, GrammarCheck(examiner))
    responses = Endpoint(service, "resp_", read_response, ResponseAnswer, sse.named_frame)
    pages = Pages(service, has_keys=keys is not None)
    middleware = [Middleware(RequestIds, is_sent_by_server=server_sends_ids), Middleware(ClosesUnread)]
    if cors_origins:  # before keys: a browser asks without one
        middleware.append(build_cors(cors_origins))
    if keys is not None:
        middleware.append(Middleware(Guard, keys=keys, refused=observer.request_denied))
    return Starlette(
        routes=[
            Route("/v1/completions", Endpoint(service, "cmpl-", read_completion, CompletionAnswer), methods=["POST"]),
            Route("/v1/chat/completions", Endpoint(service, "chatcmpl-", read_chat, ChatAnswer), methods=["POST"]),
            Route("/v1/responses", responses, methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{model_id:path}", pages.model),
            Route("/tokenize", pages.tokenize, methods=["POST"]),
            Route("/detokenize", pages.detokenize, methods=["POST"]),
            Route("/health", pages.health),
            Route("/ping", pages.ping, methods=["GET", "POST"]),
            Route("/version", pages.version),
            Route("/openapi.json", pages.openapi),
            Route("/docs", pages.docs),
            Route("/metrics", pages.metrics),
            Route("/", pages.live_page),
            Route("/live", pages.live),
            Route("/live/{name}", pages.live_asset),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _refuse, KvRelayError: _refuse, Exception: _refuse},
    )


def _explain(request: Request, error: Exception) -> Exception:
    """What the router refuses it does in two words, which do not help who mistyped an address."""
    match error:
        case HTTPException(status_code=HTTPStatus.NOT_FOUND):
            message = f"nothing is served at {shown(request.url.path)}; GET /docs says what is"
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": allowed}):
            names = ", ".join(sorted(allowed.split(", ")))
            message = f"{request.method} is not allowed at {shown(request.url.path)}; allowed: {names}"
        case _:
            return error
    return HTTPException(error.status_code, message, error.headers)


def _refuse(request: Request, error: Exception) -> Response:
    """Answer for the routes that are no `Endpoint`: unknown paths, wrong methods, health, tokens."""
    failure = failure_of(_explain(request, error))
    request_id = request.scope["state"]["request_id"]
    failure.log(request_id, error)
    response = to_response(failure.body(), failure.status)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    if request.scope["state"]["sends_id"]:
        # A 500 is sent from outside the middleware that adds the id to all other responses.
        response.headers[REQUEST_ID_HEADER] = request_id
    return response
