"""The decode pool: owns a request from its admission to its last token.

Called by the ingress, once per request. Its engine reserves KV blocks first; then a prefill replica fills them, or,
where the prompt is short, mostly cached, or there is no prefill pool, the engine computes the prompt itself. Tokens do
not pass through here: the engines send them to the ingress.
"""

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from deployments.engine_client import EventQueue
from deployments.engine_info import EngineInfo
from deployments.errors import brief, is_hopeless, was_cancelled
from deployments.front import EngineReplica, FrontSource
from deployments.messages import ANYWHERE, GenerateRequest, Placed, ReplyAddress, Route
from deployments.parity import check_parity
from deployments.prefill import Prefilled
from deployments.ray_errors import as_ours
from deployments.receipts import DecodeReceipt, PrefillReceipt, Timed

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

# The first with the replica that the ingress chose, each other with one that Serve chooses; one that has died is not
# chosen again.
_MAX_PREFILLS = 3
_PREFILL_RETRY_S = 1.0
# A prefill replica says so at once when all of a prompt has arrived, and the first token takes no longer to come here.
_PREFILL_RECEIPT_S = 1.0


class RemotePrefill:
    """The prefill pool as decode sees it.

    Args:
        handle: of the prefill deployment.
        min_tokens: prompts with fewer uncached tokens are computed by the decode engine itself, unless their route says
            otherwise.
    """

    def __init__(self, handle: "DeploymentHandle[Any]", min_tokens: int) -> None:
        self.handle = handle
        self._min_tokens = min_tokens
        self._return: asyncio.Task[None] | None = None

    @property
    def answers(self) -> bool:
        """Whether anything is left to it."""
        return self._return is None

    def threshold(self, route: Route) -> int | None:
        """A prompt with this many uncached tokens is left to it; None: it is not, for it does not answer."""
        if not self.answers:
            return None
        return self._min_tokens if route.min_remote_tokens is None else route.min_remote_tokens

    def note_silence(self) -> None:
        """A hand-off has cost its lease: the next ones shall not, until some replica answers again."""
        if self._return is None:
            logger.warning("the prefill pool does not answer: prompts are computed here until it does")
            self._return = asyncio.create_task(self._wait_for_answer())

    async def _wait_for_answer(self) -> None:
        while True:
            try:
                await self.handle.ready.remote()
                break
            except Exception as error:
                logger.warning("the prefill pool cannot serve: %s", brief(error))
                await asyncio.sleep(_PREFILL_RETRY_S)
        self._return = None
        logger.warning("the prefill pool answers again")


class Decode(EngineReplica):
    """One decode replica.

    Args:
        engine: brings its engine into being.
        prefill: None: colocated, every prompt is computed here.
        min_tokens: see `RemotePrefill`.
        parity_check: before it serves, hand a prompt over and compare the tokens.
    """

    async def __init__(  # type: ignore[misc]
        self,
        engine: FrontSource,
        prefill: "DeploymentHandle[Any] | None",
        min_tokens: int,
        parity_check: bool,
    ) -> None:
        self._prefill = None if prefill is None else RemotePrefill(prefill, min_tokens)
        self._front = await engine.start()
        if parity_check and prefill is not None:
            await check_parity(self.generate_by, ray.util.get_node_ip_address(), self._front.engine.info)

    async def generate(self, request: GenerateRequest, reply_to: ReplyAddress) -> DecodeReceipt | None:
        """Continue a prompt; returns when its last token is on its way. Cancelling it ends the request on both pools.

        Args:
            request: the prompt.
            reply_to: where the tokens go; each comes at least once, in order.

        Returns:
            What became of it here, where the request wants to know.

        Raises:
            InvalidRequestError: the request can never run, or no engine can go on with it.
            EngineDeadError: this replica's engine died.
            TransferError: the tokens can no longer be delivered.
        """
        threshold = None if self._prefill is None else self._prefill.threshold(request.route)
        return await self.generate_by(request, reply_to, threshold)

    @property
    def has_prefill(self) -> bool:
        """Whether prompts are left to the prefill pool now."""
        return self._prefill is not None and self._prefill.answers

    async def generate_by(
        self, request: GenerateRequest, reply_to: ReplyAddress, remote_threshold: int | None
    ) -> DecodeReceipt | None:
        """`generate` with a threshold of one's own."""
        engine, request_id = self._front.engine, request.request_id
        events = engine.open(request_id)
        handoff: asyncio.Task[None] | None = None
        times, prefills = None, list[PrefillReceipt]()
        try:
            await engine.add(request, remote_threshold, reply_to)
            async for event in events:
                if isinstance(event, Placed):
                    if handoff is not None and self._prefill is not None:
                        handoff.cancel()  # its lease ran out, and the engine computes the prompt now
                        self._prefill.note_silence()
                    elif event.remote:
                        coming = self._prefill_remotely(request, event, reply_to, events, prefills)
                        handoff = asyncio.create_task(coming)
                elif isinstance(event, Timed):
                    times = event.times
            if request.wants_receipt and handoff is not None:
                await asyncio.wait([handoff], timeout=_PREFILL_RECEIPT_S)
        finally:
            if handoff is not None:
                handoff.cancel()
            engine.close(request_id)
        return DecodeReceipt(self._front.replica, times, tuple(prefills)) if request.wants_receipt else None

    async def engine_info(self) -> EngineInfo:
        return self._front.engine.info

    async def _prefill_remotely(
        self,
        request: GenerateRequest,
        placed: Placed,
        reply_to: ReplyAddress,
        events: EventQueue,
        receipts: list[PrefillReceipt],
    ) -> None:
        """Have the prompt computed by a prefill replica; if that fails, by another; in the end here.

        A request that no replica could do anything with fails.
        """
        assert self._prefill is not None, "placed remotely without a prefill pool"
        engine, request_id = self._front.engine, request.request_id
        first_block = placed.num_cached_tokens // engine.info.block_size
        for attempt in range(_MAX_PREFILLS):
            if attempt and not await engine.handle.renew(request_id):
                return  # the lease ran out, and the engine computes it
            # Again not by the replica that has failed, if Serve finds another.
            asked = replace(request, route=ANYWHERE) if attempt else request
            call: Any = self._prefill.handle.prefill.remote(asked, first_block, engine.handle, reply_to, engine.info.kv)
            try:
                prefilled: Prefilled = await call
            except (Exception, asyncio.CancelledError) as error:
                if was_cancelled():
                    call.cancel()
                    raise
                self._front.handoff.num_failures += 1
                if isinstance(error, Exception) and is_hopeless(ours := as_ours(error)):
                    events.put(ours)
                    return
                receipts.append(PrefillReceipt(error=brief(error)))
                logger.warning("%s: remote prefill %d failed: %s", request_id, attempt + 1, brief(error))
                continue
            if prefilled.receipt is not None:
                receipts.append(prefilled.receipt)
            if prefilled.has_finished:  # with its first token: there is nothing to decode
                events.finish()
            return
        logger.warning("%s: prefilling locally", request_id)
        await engine.handle.prefill_locally(request_id)
