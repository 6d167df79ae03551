"""The ingress's end: takes the tokens of all its requests from all engines, and sorts them by request.

An engine connects when the first request names this receiver to it. Lives in the ingress's event loop; knows no Ray and
no HTTP.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from deployments.errors import EngineDeadError, SlowReaderError
from deployments.messages import FinishReason, ReplyAddress, TokenOutput
from deployments.tokens.wire import KEY_BYTES, FrameReader, WireError

logger = logging.getLogger(__name__)

# Longer than a stranger should take to say the key.
_KEY_TIMEOUT_S = 10.0


class TokenStream:
    """The tokens of one request, for one reader: an asynchronous iterator that ends after the finish reason.

    Whatever has come since the reader last asked is one output. The same token may come twice, from the prefill engine
    and again from the decode engine; the reader gets it once. No generator, for it is on the path of every token.

    Attributes:
        name: the id by which engines send its tokens; another one after the request was resumed (`rename`).
        token_ids: all that have arrived.

    Args:
        request_id: of the request.
        max_unread_tokens: with more waiting the reader is given up: it gets `SlowReaderError`, and no more tokens.
        on_overflow: called once when that happens.
        on_close: called once when the reader closes the stream.
    """

    def __init__(
        self,
        request_id: str,
        max_unread_tokens: int,
        on_overflow: Callable[[], None],
        on_close: Callable[["TokenStream"], object],
    ) -> None:
        self.request_id = request_id
        self.name = request_id
        self.token_ids: list[int] = []
        self._max_unread_tokens = max_unread_tokens
        self._on_overflow = on_overflow
        self._on_close = on_close
        self._is_closed = False
        self._unread: list[TokenOutput] = []
        self._num_read = 0
        self._finish_reason: FinishReason | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_next: Callable[[], None] | None = None

    @property
    def has_finished(self) -> bool:
        """Whether the last token has arrived, read or not."""
        return self._finish_reason is not None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come: it has finished, or failed."""
        return self._finish_reason is not None or self._error is not None

    async def aclose(self) -> None:
        """Stop listening; tokens that still come are dropped. The reader must do so, whatever happens."""
        if not self._is_closed:
            self._is_closed = True
            self._on_close(self)

    def push(self, output: TokenOutput) -> None:
        """Take an output that has arrived."""
        if self._error is not None or self._finish_reason is not None:
            return
        num_received = len(self.token_ids)
        num_known = num_received - output.index
        if num_known:
            if num_known >= len(output.token_ids):
                return
            if num_known < 0:
                self.fail(EngineDeadError(f"{self.request_id}: tokens {num_received} to {output.index} are lost"))
                return
            output = _without_first(output, num_known)
        self.token_ids += output.token_ids
        self._finish_reason = output.finish_reason
        self._unread.append(output)
        if self._on_next is not None:
            on_next, self._on_next = self._on_next, None
            on_next()
        if len(self.token_ids) - self._num_read > self._max_unread_tokens:
            self._overflow()
        else:
            self._wake()

    def call_on_next(self, on_next: Callable[[], None]) -> None:
        """Call this once, when the next token arrives."""
        self._on_next = on_next

    def continue_as(self, name: str) -> None:
        """From now on tokens come under another name; called by the receiver."""
        self.name = name

    def fail(self, error: Exception) -> None:
        """End the stream: the reader gets what has come, and then the error. Does nothing if it has ended already."""
        if self._error is None and self._finish_reason is None:
            self._error = error
            self._wake()

    def _overflow(self) -> None:
        self._unread.clear()
        self._finish_reason = None
        bound = self._max_unread_tokens
        self._error = SlowReaderError(f"the client has left more than {bound} tokens unread; the request was ended")
        self._wake()
        self._on_overflow()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._finish_reason is not None:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        # What a prefill engine drew stays apart from what comes behind it: some want to know which pool made a token.
        num_outputs = 1 if self._unread[0].by_prefill else len(self._unread)
        outputs, self._unread = self._unread[:num_outputs], self._unread[num_outputs:]
        self._num_read = outputs[-1].index + len(outputs[-1].token_ids)
        return outputs[0] if len(outputs) == 1 else _join(outputs)


class TokenReceiver:
    """Listens for engines and owns the streams of this process. Build with `start`."""

    def __init__(self, max_unread_tokens: int) -> None:
        self.max_unread_tokens = max_unread_tokens
        self.address = ReplyAddress("", 0, secrets.token_bytes(KEY_BYTES))
        self._streams: dict[str, TokenStream] = {}
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(cls, host: str, max_unread_tokens: int) -> "TokenReceiver":
        """Listen on a free port of `host`, an IP address that the engines can reach."""
        receiver = cls(max_unread_tokens)
        loop = asyncio.get_running_loop()
        receiver._server = await loop.create_server(lambda: _Connection(receiver), host, 0)
        port: int = receiver._server.sockets[0].getsockname()[1]
        receiver.address = ReplyAddress(host, port, receiver.address.key)
        return receiver

    @property
    def num_channels(self) -> int:
        """Engines that are connected."""
        return len(self._connections)

    @property
    def num_streams(self) -> int:
        """Requests that are open."""
        return len(self._streams)

    def open(
        self, request_id: str, on_overflow: Callable[[], None], on_close: Callable[[TokenStream], object]
    ) -> TokenStream:
        """Start listening for a request's tokens; before an engine hears of it. See `TokenStream`."""

        def close(stream: TokenStream) -> None:
            del self._streams[stream.name]
            on_close(stream)

        assert request_id not in self._streams, request_id
        stream = self._streams[request_id] = TokenStream(request_id, self.max_unread_tokens, on_overflow, close)
        return stream

    def rename(self, stream: TokenStream, name: str) -> None:
        """Take the tokens of this name as what comes next in an open stream; those of its old name are dropped."""
        assert name not in self._streams, name
        del self._streams[stream.name]
        self._streams[name] = stream
        stream.continue_as(name)

    async def stop(self) -> None:
        """Close every connection; the engines then end what they run for this receiver."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.push(output)


@dataclass(eq=False)
class _Connection(asyncio.Protocol):
    """One engine; a stranger until it has said the key."""

    receiver: TokenReceiver

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self._reader = FrameReader()
        self._said = b""
        self._is_known = False
        self._deadline = asyncio.get_running_loop().call_later(_KEY_TIMEOUT_S, self.abort)

    def data_received(self, data: bytes) -> None:
        if not self._is_known:
            data = self._read_key(data)
        try:
            for outputs in self._reader.feed(data):
                self.receiver._deliver(outputs)
        except WireError:
            logger.exception("token channel: closed")
            self.abort()

    def _read_key(self, data: bytes) -> bytes:
        """What comes behind the key; nothing while it is not there, or is another."""
        self._said += data
        if len(self._said) < KEY_BYTES:
            return b""
        if not secrets.compare_digest(self._said[:KEY_BYTES], self.receiver.address.key):
            logger.warning("token channel: %s did not know the key", self._transport.get_extra_info("peername"))
            self.abort()
            return b""
        self._deadline.cancel()
        self._is_known = True
        self.receiver._connections.add(self)
        return self._said[KEY_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self.receiver._connections.discard(self)

    def abort(self) -> None:
        self._transport.abort()


def _without_first(output: TokenOutput, num_tokens: int) -> TokenOutput:
    return TokenOutput(
        output.request_id,
        output.index + num_tokens,
        output.token_ids[num_tokens:],
        output.finish_reason,
        output.num_cached_tokens,
        output.draws[num_tokens:],  # and not what comes with the first
        by_prefill=output.by_prefill,
    )


def _join(outputs: list[TokenOutput]) -> TokenOutput:
    first, last = outputs[0], outputs[-1]
    token_ids = tuple(token_id for output in outputs for token_id in output.token_ids)
    num_cached_tokens = min(output.num_cached_tokens for output in outputs)
    draws = tuple(draw for output in outputs for draw in output.draws)
    return TokenOutput(
        first.request_id, first.index, token_ids, last.finish_reason, num_cached_tokens, draws, first.prompt
    )
