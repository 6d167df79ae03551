"""The routes that generate nothing: what is served, in which version and state, and texts as tokens.

`http.py` routes to it. Errors become answers there.
"""

import asyncio
import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deployments.api import sse
from deployments.api.body import read_body
from deployments.api.calls import ModelNotFoundError
from deployments.api.docs_page import HEADERS, render_page
from deployments.api.exchange import Service
from deployments.api.forms import Health, Model, Models, Version
from deployments.api.live_page import ASSETS, PAGE, PAGE_WITH_KEYS, Asset
from deployments.api.openapi import describe_api
from deployments.api.text import TextCodec
from deployments.api.tokenization import detokenize, tokenize
from deployments.messages import ModelInfo

_METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Pages:
    """One method per route.

    Attributes:
        service: what calls are served with.
        has_keys: the numbers of the live page need one.
    """

    service: Service
    has_keys: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    async def models(self, _: Request) -> Response:
        models: Models = {"object": "list", "data": [self._model()]}
        return to_response(models)

    async def model(self, request: Request) -> Response:
        model_id, name = request.path_params["model_id"], self.service.info.name
        if model_id != name:
            raise ModelNotFoundError(f"the model {reprlib.repr(model_id)} does not exist; {name!r} does", "model")
        return to_response(self._model())

    def _model(self) -> Model:
        """Clients use `max_model_len` to size prompts, and `root` to find a tokenizer."""
        info = self.service.info
        return {
            "id": info.name,
            "object": "model",
            "created": self.created,
            "owned_by": "kvrelay",
            "root": info.root or info.name,
            "parent": None,
            "max_model_len": info.max_model_len,
        }

    async def tokenize(self, request: Request) -> Response:
        return await self._convert(request, tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._convert(request, detokenize)

    async def _convert(
        self, request: Request, convert: Callable[[bytes, TextCodec, ModelInfo], Mapping[str, Any]]
    ) -> Response:
        service = self.service
        try:
            body = await read_body(request, service.max_body_bytes, service.body_timeout_s)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # which nobody reads
        # A long text takes a while, which streams of others shall not notice.
        return to_response(await asyncio.to_thread(convert, body, service.codec, service.info))

    async def health(self, _: Request) -> Response:
        is_healthy, reason = await self.service.backend.health()
        if is_healthy:
            answer: Health = {"status": "ok"}
            return to_response(answer)
        answer = {"status": "unavailable", "reason": reason}
        return to_response(answer, HTTPStatus.SERVICE_UNAVAILABLE)

    async def ping(self, _: Request) -> Response:
        """As `health`, in the form that SageMaker asks for: the status alone."""
        is_healthy, _reason = await self.service.backend.health()
        return Response(status_code=HTTPStatus.OK if is_healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    async def version(self, _: Request) -> Response:
        answer: Version = {"version": own_version()}
        return to_response(answer)

    async def openapi(self, request: Request) -> Response:
        return to_response(describe_api() | {"servers": [{"url": request.scope.get("root_path") or "/"}]})

    async def docs(self, _: Request) -> Response:
        return Response(render_page(describe_api()), headers=HEADERS, media_type="text/html")

    async def live_page(self, request: Request) -> Response:
        return _to_asset_response(PAGE_WITH_KEYS if self.has_keys else PAGE, request)

    async def live_asset(self, request: Request) -> Response:
        asset = ASSETS.get(request.path_params["name"])
        if asset is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return _to_asset_response(asset, request)

    async def live(self, _: Request) -> Response:
        """What the page shows; nobody keeps it."""
        response = to_response(await self.service.backend.live())
        response.headers["cache-control"] = "no-store"
        return response

    async def metrics(self, _: Request) -> Response:
        return Response(await self.service.backend.metrics(), headers={"content-type": _METRICS_CONTENT_TYPE})


@cache
def own_version() -> str:
    """Of this package, as it is installed."""
    try:
        return version("kvrelay")
    except PackageNotFoundError:  # run from a folder that was not installed
        return "unknown"


def to_response(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(sse.to_json(value), status_code=status, media_type="application/json")


def _to_asset_response(asset: Asset, request: Request) -> Response:
    if request.headers.get("if-none-match") == asset.headers["etag"]:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=asset.headers)
    return Response(asset.body, headers=asset.headers)
