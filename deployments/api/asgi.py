"""Two things that Starlette does not do for us, on bare ASGI: an id per request, and work that ends with its client.

Knows nothing of what is served; `http.py` uses both.
"""

import asyncio
import uuid
from collections.abc import Coroutine
from typing import TypeVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")


class RequestIds:
    """Middleware that gives every request an id: `scope["state"]["request_id"]`, and `X-Request-Id` of the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


async def until_disconnect(
    receive: Receive, work: Coroutine[object, object, T], given_up: "asyncio.Future[None]"
) -> T | None:
    """Run `work` until it ends or the client leaves; then it is cancelled, cleaned up, and None comes back.

    The request's body must have been read: whatever else `receive` brings is dropped. `given_up` counts as leaving, for
    a client that is there and does not read.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher, given_up), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
