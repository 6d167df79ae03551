"""The engine's end: sends each step's tokens to the ingress replicas that asked for them. `EngineActor` owns one.

Everything happens in a thread of its own, so that neither a slow network nor a dead ingress holds up a step. Connects
to a receiver when the first request names it, and keeps the connection for all later ones. Knows no Ray.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import cast

import uvloop

from deployments.messages import ReplyAddress, TokenOutput
from deployments.tokens.wire import encode

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
# Some seconds of an engine's tokens. A receiver only sorts them, so one that is this far behind hangs.
MAX_UNSENT_BYTES = 16 * 2**20

OnLoss = Callable[[str, str], None]


class TokenSender:
    """Sends token outputs to where their requests came from. Methods may be called from any thread and never block.

    Args:
        on_loss: told the request id and the reason when a request's tokens can no longer be delivered; in the sender's
            thread, once per request that is registered and has not finished.
        max_unsent_bytes: a receiver that is further behind is given up.
        connect_timeout_s: a receiver that takes longer to connect to is given up.
    """

    def __init__(
        self,
        on_loss: OnLoss,
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._on_loss = on_loss
        self._max_unsent_bytes = max_unsent_bytes
        self._connect_timeout_s = connect_timeout_s
        self._channels: dict[ReplyAddress, _Channel] = {}
        self._routes: dict[str, _Channel] = {}
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="token-sender", daemon=True)
        self._thread.start()

    @property
    def num_channels(self) -> int:
        """Receivers that are connected, or being connected to."""
        return len(self._channels)

    def register(self, request_id: str, address: ReplyAddress) -> None:
        """Say where a request's tokens go; before its first one is sent. Connects at once."""
        self._loop.call_soon_threadsafe(self._register, request_id, address)

    def send(self, outputs: Sequence[TokenOutput]) -> None:
        """Send a step's outputs, in order with those before; those of unknown requests are dropped."""
        self._loop.call_soon_threadsafe(self._send, outputs)

    def forget(self, request_id: str) -> None:
        """The request was ended: what still comes of it is dropped. Unknown ids are no error."""
        self._loop.call_soon_threadsafe(self._forget, request_id)

    def stop(self) -> None:
        """Send what is buffered, close every connection and end the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _register(self, request_id: str, address: ReplyAddress) -> None:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = _Channel(address, self._lose, self._max_unsent_bytes)
            channel.connect(self._loop, self._connect_timeout_s)
        channel.request_ids.add(request_id)
        self._routes[request_id] = channel

    def _send(self, outputs: Sequence[TokenOutput]) -> None:
        batches: dict[_Channel, list[TokenOutput]] = {}
        for output in outputs:
            channel = self._routes.get(output.request_id)
            if channel is not None:
                batches.setdefault(channel, []).append(output)
                if output.finish_reason is not None:
                    self._forget(output.request_id)
        for channel, batch in batches.items():
            channel.send(batch)

    def _forget(self, request_id: str) -> None:
        channel = self._routes.pop(request_id, None)
        if channel is not None:
            channel.request_ids.discard(request_id)

    def _lose(self, channel: "_Channel", reason: str) -> None:
        del self._channels[channel.address]
        for request_id in channel.request_ids:
            del self._routes[request_id]
            self._on_loss(request_id, reason)

    async def _close(self) -> None:
        channels = list(self._channels.values())
        for channel in channels:
            channel.close()
        await asyncio.gather(*(channel.closed.wait() for channel in channels))


class _Channel(asyncio.Protocol):
    """The connection to one receiver. Lives in the sender's loop."""

    def __init__(
        self, address: ReplyAddress, on_loss: Callable[["_Channel", str], None], max_unsent_bytes: int
    ) -> None:
        self.address = address
        self.request_ids: set[str] = set()
        self.closed = asyncio.Event()
        self._on_loss = on_loss
        self._max_unsent_bytes = max_unsent_bytes
        self._transport: asyncio.Transport | None = None
        self._early: list[TokenOutput] = []
        self._reason = ""

    def connect(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._connecting = loop.create_task(self._connect(loop, timeout_s))

    async def _connect(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(lambda: self, self.address.host, self.address.port)
        except (OSError, TimeoutError) as error:
            detail = str(error) or f"no connection within {timeout_s:g} s"
            self._reason = f"cannot reach the ingress at {self.address.host}:{self.address.port}: {detail}"
            self.connection_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self._transport.write(self.address.key)
        if self._early:
            self._transport.write(encode(self._early))
            self._early.clear()

    def send(self, batch: list[TokenOutput]) -> None:
        transport = self._transport
        if transport is None:
            self._early += batch
            return
        transport.write(encode(batch))
        if transport.get_write_buffer_size() > self._max_unsent_bytes:
            self._reason = f"the ingress has left more than {self._max_unsent_bytes} bytes of tokens unread"
            transport.abort()

    def close(self) -> None:
        if self._transport is None:
            self._connecting.cancel()
            self.connection_lost(None)
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        reason = self._reason or f"the ingress closed the token channel ({exc or 'end of stream'})"
        if self.request_ids:
            logger.warning("%s: %d requests end", reason, len(self.request_ids))
        self._on_loss(self, reason)
