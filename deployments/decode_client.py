"""One request as the ingress has it served: by a decode replica and, if that is lost, by another from where it was.

A token is a pure function of the tokens before it, the seed and its position, so the other replica is given the prompt
and all tokens that have come, and goes on with the very next one. The client sees only time. Called by the ingress,
once per request; the tokens themselves come another way, to the request's `TokenStream`.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from deployments.errors import EngineDeadError, KvRelayError, OverloadedError, TransferError, brief, was_cancelled
from deployments.messages import GenerateRequest, resumed_id
from deployments.tokens.receiver import TokenReceiver, TokenStream

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

# Between "every token is on its way" and the last one's arrival; they take different paths.
_LAST_TOKEN_TIMEOUT_S = 10.0
# A request that itself kills engines must not go through all of them.
_MAX_RESUMES = 6
_FIRST_DELAY_S = 0.05


class ResumingClient:
    """Has requests served by the decode pool, through the deaths of its replicas.

    Args:
        decode: handle of the decode deployment.
        tokens: where the engines send the tokens.
        timeout_s: a request that was lost and has had no new token for so long fails.
        on_resume: called for each time that a request is resumed.
    """

    def __init__(
        self,
        decode: "DeploymentHandle[Any]",
        tokens: TokenReceiver,
        timeout_s: float,
        on_resume: Callable[[], None],
    ) -> None:
        self._decode = decode
        self._tokens = tokens
        self._timeout_s = timeout_s
        self._on_resume = on_resume

    async def serve(self, request: GenerateRequest, stream: TokenStream) -> None:
        """Have a request served until its last token is in the stream, or fail the stream.

        Cancelling this ends the request on every pool.
        """
        try:
            await self._serve(request, stream)
        except Exception as error:  # else its reader would wait for ever
            stream.fail(error)

    async def _serve(self, request: GenerateRequest, stream: TokenStream) -> None:
        for attempt in itertools.count():
            error = await self._attempt(_remainder(request, stream), stream, is_resumed=attempt > 0)
            # A full pool refuses who comes, but not who was there.
            is_lost = isinstance(error, EngineDeadError | TransferError) or (
                attempt > 0 and isinstance(error, OverloadedError)
            )
            if attempt == _MAX_RESUMES or not is_lost:
                stream.fail(error)
            if stream.has_ended:
                return
            logger.warning("%s: lost behind %d tokens: %s", request.request_id, len(stream.token_ids), brief(error))
            self._on_resume()
            self._tokens.rename(stream, resumed_id(request.request_id, attempt + 1))
            await asyncio.sleep(_FIRST_DELAY_S * 2**attempt)

    async def _attempt(self, request: GenerateRequest, stream: TokenStream, *, is_resumed: bool) -> Exception:
        """Have one replica serve a request; returns why its last token did not come."""
        try:
            call: Any = self._decode.generate.remote(request, self._tokens.address)
            await (self._progress(call, stream) if is_resumed else call)
            await asyncio.sleep(_LAST_TOKEN_TIMEOUT_S)  # cancelled as soon as the reader has the last token
        except asyncio.CancelledError:
            if not was_cancelled():
                return EngineDeadError("the replica ended the call")
            if not stream.has_finished:
                call.cancel()
            raise
        except Exception as error:
            return as_ours(error)
        return TransferError(f"the last token did not arrive within {_LAST_TOKEN_TIMEOUT_S:.0f} s")

    async def _progress(self, call: Any, stream: TokenStream) -> None:
        """Wait for the end of a call, but no longer than `timeout_s` for its first token."""
        num_tokens = len(stream.token_ids)
        end = asyncio.ensure_future(_wait(call))
        try:
            has_ended, _ = await asyncio.wait([end], timeout=self._timeout_s)
            if not has_ended and len(stream.token_ids) == num_tokens:
                call.cancel()
                stream.fail(EngineDeadError(f"no replica went on with the request within {self._timeout_s:g} s"))
                return
            await end
        finally:
            end.cancel()


async def _wait(call: Any) -> None:
    await call


def _remainder(request: GenerateRequest, stream: TokenStream) -> GenerateRequest:
    """What is left to do of a request, under the id by which its stream goes now."""
    done = tuple(stream.token_ids)
    if not done and stream.name == request.request_id:
        return request
    sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(done))
    prompt = request.prompt_token_ids + done
    return replace(
        request, request_id=stream.name, prompt_token_ids=prompt, sampling=sampling, num_resumed_tokens=len(done)
    )


def as_ours(error: Exception) -> Exception:
    """The error as it was raised in the pool; the loss of a replica becomes `EngineDeadError`."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, KvRelayError):
        return cause
    if isinstance(cause, BackPressureError):
        return OverloadedError(f"overloaded: every replica of a pool is at its limit: {cause}")
    if isinstance(cause, RayActorError | ReplicaUnavailableError | DeploymentUnavailableError | grpc.RpcError):
        return EngineDeadError(f"a replica was lost while it served the request: {brief(cause)}")
    return error
