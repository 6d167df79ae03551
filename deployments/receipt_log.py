"""Puts together what became of one request that wants a receipt, and has its reader wait for the last of it.

The tokens come from engines, and what a replica says of its work when it is done: where the answer is to hold the
receipt, the last token waits for that, for a moment at most. Lives in the ingress; `decode_client.py` writes,
`pool_backend.py` reads.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from deployments.messages import TokenOutput
from deployments.receipts import PATIENCE_S, Attempt, DecodeReceipt, Receipt
from deployments.routing.pools import RoutedRequest
from deployments.tokens.receiver import TokenStream

logger = logging.getLogger(__name__)


class ReceiptLog:
    """Of one request.

    Args:
        tell: called with what is known, whenever that is more than before.
    """

    def __init__(self, tell: Callable[[Receipt], None]) -> None:
        self._tell = tell
        self._attempts: list[Attempt] = []
        self._sent_s = 0.0
        self._num_tokens_before = 0
        self._is_settled = asyncio.Event()
        self._on_settled: asyncio.Task[None] | None = None

    def sent(self, routed: RoutedRequest, num_tokens: int) -> None:
        """It goes to a replica; so many of its tokens have come by now."""
        self._sent_s, self._num_tokens_before = time.monotonic(), num_tokens
        self._is_settled.clear()  # what a replica said whose last tokens were lost is not the end
        prefill_reason = routed.reasons[1] if len(routed.reasons) > 1 else None
        reason = routed.reasons[0] if routed.reasons else ""
        self._attempts.append(Attempt(routed.route.decode, reason, prefill_reason, None, 0, None, ""))
        self._tell(tuple(self._attempts))

    def first_token(self) -> None:
        """The first token of this attempt has come."""
        self._note(first_token_s=time.monotonic() - self._sent_s)

    def ended(self, num_tokens: int, decode: DecodeReceipt | None = None, error: str = "") -> None:
        """This attempt is over, with so many tokens of the request in all."""
        if decode is not None:
            self._note(replica=decode.replica)
        self._note(num_tokens=num_tokens - self._num_tokens_before, decode=decode, error=error)
        if not error:
            self._is_settled.set()
            if self._on_settled is not None:
                self._on_settled.cancel()

    def cut(self, num_tokens: int) -> None:
        """Nobody wants more than the tokens that have come: the answer has ended, or its reader has left."""
        if self._attempts:
            self._came(num_tokens)

    def end_when_settled(self, serving: "asyncio.Task[None]", num_tokens: int) -> None:
        """Cancel what serves the request, whose tokens have all come, once it has heard how it was served."""
        if self._is_settled.is_set():
            self._came(num_tokens)
            serving.cancel()
        else:
            self._on_settled = serving
            asyncio.get_running_loop().call_later(PATIENCE_S, serving.cancel)

    async def settle(self, num_tokens: int) -> None:
        """Wait until all is known; so many tokens have come, and there are no more."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._is_settled.wait()
        except TimeoutError:
            logger.warning("the replica that served a request did not say how within %g s", PATIENCE_S)
        self._came(num_tokens)

    def _came(self, num_tokens: int) -> None:
        """All tokens have: some maybe after the replica had said that it was done, by another way."""
        self._note(num_tokens=num_tokens - self._num_tokens_before)

    def _note(self, **what: object) -> None:
        attempt = replace(self._attempts[-1], **what)  # type: ignore[arg-type]
        if attempt != self._attempts[-1]:
            self._attempts[-1] = attempt
            self._tell(tuple(self._attempts))


class ReceiptStream:
    """The tokens of a request whose last one comes when the receipt is whole; see `TokenStream`."""

    def __init__(self, stream: TokenStream, log: ReceiptLog) -> None:
        self._stream = stream
        self._log = log

    def __aiter__(self) -> "ReceiptStream":
        return self

    async def __anext__(self) -> TokenOutput:
        output = await self._stream.__anext__()
        if output.finish_reason is not None:
            await self._log.settle(len(self._stream.token_ids))
        return output

    async def aclose(self) -> None:
        await self._stream.aclose()
