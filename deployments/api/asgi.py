"""What Starlette does not do for us, on bare ASGI: ids of requests, and work and connections that end when they should.

Knows nothing of what is served; `exchange.py` uses it.
"""

import asyncio
import re
import uuid
from collections.abc import Coroutine
from typing import TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")


REQUEST_ID_HEADER = "x-request-id"
# What a caller may name its request: it goes into logs and headers.
REQUEST_ID = re.compile(r"[A-Za-z0-9._~:@=+/-]{1,128}")


class RequestIds:
    """Middleware that gives every request two ids, in `scope["state"]`.

    `call_id` is ours and unique. `request_id` is the `X-Request-Id` that the request came with, where `REQUEST_ID`
    allows it, or else the same; the response bears it.

    Args:
        app: what is wrapped.
        is_sent_by_server: the server in front puts an id into the request's headers where there is none, and into the
            response's, as Ray Serve does.
    """

    def __init__(self, app: ASGIApp, is_sent_by_server: bool = False) -> None:
        self._app = app
        self._is_sent_by_server = is_sent_by_server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        named = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        call_id = uuid.uuid4().hex
        request_id = named if REQUEST_ID.fullmatch(named) else call_id
        scope.setdefault("state", {}).update(
            call_id=call_id, request_id=request_id, sends_id=not self._is_sent_by_server
        )

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send if self._is_sent_by_server else send_with_id)


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


class ClosesUnread:
    """Middleware that closes a connection whose request was answered before all of its body had come.

    Else whoever sends the rest a byte at a time keeps it open for as long as he likes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_unread = _has_body(Headers(scope=scope))

        async def read() -> Message:
            nonlocal is_unread
            message = await receive()
            is_unread = is_unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and is_unread:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, read, answer)


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
