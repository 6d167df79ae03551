"""The ingress's side of the decode pool: a request is served to its last token, through the deaths of replicas.

A token is a pure function of the tokens before it, the seed and its position. So if a replica is lost, another one is
given the prompt and all tokens that have come, and goes on with the very next one; the client sees only time. The
tokens themselves come another way, to the request's `TokenStream`.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deployments.errors import EngineDeadError, OverloadedError, TransferError, brief, was_cancelled
from deployments.load.held import HeldRequests
from deployments.messages import GenerateRequest, resumed_id
from deployments.ray_errors import as_ours
from deployments.receipt_log import ReceiptLog
from deployments.receipts import DecodeReceipt
from deployments.routing.pools import PoolRouters
from deployments.tokens.receiver import TokenReceiver, TokenStream

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

# Between "every token is on its way" and the last one's arrival; they take different paths.
_LAST_TOKEN_TIMEOUT_S = 10.0
# A request that itself kills engines must not go through all of them.
_MAX_RESUMES = 6
_FIRST_DELAY_S = 0.05


class _NobodyGoesOnError(EngineDeadError):
    """No replica went on with a request that was lost; it is not tried again."""


class DecodeClient:
    """Has requests served by the decode pool.

    Args:
        decode: handle of the decode deployment.
        tokens: where the engines send the tokens.
        resume_timeout_s: a request that was lost and has had no new token for so long fails.
        on_resume: called for each time that a request is resumed.
        routers: choose the replicas.
        held: has requests wait while there is no replica; None: there is always one.
    """

    def __init__(
        self,
        decode: "DeploymentHandle[Any]",
        tokens: TokenReceiver,
        resume_timeout_s: float,
        on_resume: Callable[[], None],
        routers: PoolRouters,
        held: HeldRequests | None = None,
    ) -> None:
        self._decode = decode
        self._tokens = tokens
        self._resume_timeout_s = resume_timeout_s
        self._on_resume = on_resume
        self._routers = routers
        self._held = held

    async def serve(self, request: GenerateRequest, stream: TokenStream, log: ReceiptLog | None = None) -> None:
        """Have a request served until its last token is in the stream, or fail the stream.

        Cancelling this ends the request on every pool.

        Args:
            request: the request.
            stream: of its tokens.
            log: is told what becomes of it; of a request that wants a receipt.
        """
        try:
            await self._serve(request, stream, log)
        except Exception as error:  # else its reader would wait for ever
            stream.fail(error)

    async def _serve(self, request: GenerateRequest, stream: TokenStream, log: ReceiptLog | None) -> None:
        if self._held is not None:
            await self._held.wait(request.num_given_tokens)
        for attempt in itertools.count():
            try:
                await self._attempt(_remainder(request, stream), stream, log, is_resumed=attempt > 0)
                return
            except (EngineDeadError, TransferError, OverloadedError) as error:
                if log is not None:
                    log.ended(len(stream.token_ids), error=brief(error))
                if stream.has_ended:
                    return
                if attempt == _MAX_RESUMES or not _may_resume(error, is_resumed=attempt > 0):
                    raise
                logger.warning("%s: lost behind %d tokens: %s", request.request_id, len(stream.token_ids), brief(error))
            self._on_resume()
            self._tokens.rename(stream, resumed_id(request.request_id, attempt + 1))
            await asyncio.sleep(_FIRST_DELAY_S * 2**attempt)

    async def _attempt(
        self, request: GenerateRequest, stream: TokenStream, log: ReceiptLog | None, *, is_resumed: bool
    ) -> None:
        """Have one replica serve a request; returns some time after the last token has come.

        Raises:
            EngineDeadError, TransferError: the replica was lost, or some tokens of it were.
            KvRelayError: what else went wrong there.
        """
        call: Any = None
        routed = self._routers.route(request)
        stream.call_on_next(routed.first_token if log is None else _both(routed.first_token, log.first_token))
        if log is not None:
            log.sent(routed, len(stream.token_ids))
        try:
            call = self._decode.generate.remote(replace(request, route=routed.route), self._tokens.address)
            receipt = await (self._first_progress(call, stream) if is_resumed else self._served(call, stream))
            if log is not None:
                log.ended(len(stream.token_ids), receipt)
            await asyncio.sleep(_LAST_TOKEN_TIMEOUT_S)  # cancelled as soon as the reader has the last token
        except asyncio.CancelledError:
            if not was_cancelled():
                self._routers.lost(routed.route)
                raise EngineDeadError("the replica ended the call") from None
            if not stream.has_finished:
                call.cancel()
            raise
        except Exception as error:
            ours = as_ours(error)
            if isinstance(ours, EngineDeadError):
                self._routers.lost(routed.route)
            raise ours from error
        finally:
            routed.ended()
        if not stream.has_ended:
            raise TransferError(f"the last token did not arrive within {_LAST_TOKEN_TIMEOUT_S:.0f} s")

    async def _served(self, call: Any, stream: TokenStream) -> DecodeReceipt | None:
        """Wait for the end of a call; that of one which came as the last replica went Serve holds, however long.

        Raises:
            StartingError: it has waited for too long, and there is no replica still.
        """
        if self._held is None:
            return await _wait(call)
        end = asyncio.ensure_future(_wait(call))
        try:
            while not end.done():
                await asyncio.wait([end], timeout=self._held.max_s)
                if not end.done() and not stream.token_ids and self._held.is_closed:
                    call.cancel()
                    raise self._held.give_up()
            return await end
        finally:
            end.cancel()

    async def _first_progress(self, call: Any, stream: TokenStream) -> DecodeReceipt | None:
        """Wait for the end of a call, but no longer than `resume_timeout_s` for its first token."""
        num_tokens = len(stream.token_ids)
        end = asyncio.ensure_future(_wait(call))
        try:
            await asyncio.wait([end], timeout=self._resume_timeout_s)
            if not end.done() and len(stream.token_ids) == num_tokens:
                call.cancel()
                raise _NobodyGoesOnError(f"no replica went on with the request within {self._resume_timeout_s:g} s")
            return await end
        finally:
            end.cancel()


async def _wait(call: Any) -> DecodeReceipt | None:
    receipt: DecodeReceipt | None = await call
    return receipt


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _may_resume(error: Exception, *, is_resumed: bool) -> bool:
    """A full pool refuses who comes, but not who was there."""
    if isinstance(error, OverloadedError):
        return is_resumed
    return not isinstance(error, _NobodyGoesOnError)


def _remainder(request: GenerateRequest, stream: TokenStream) -> GenerateRequest:
    """What is left to do of a request, under the id by which its stream goes now."""
    return replace(request, request_id=stream.name, generated_token_ids=tuple(stream.token_ids))
