"""The decode pool: owns a request from its admission to its last token.

Called by the ingress, once per request. Its engine reserves KV blocks; a prefill replica fills them, or, where the
prompt is short, mostly cached, or there is no prefill pool, the engine computes the prompt itself. Prefill begins while
the engine still reserves, if it is sure to be asked for the whole prompt. Tokens do not pass through here: the engines
send them to the ingress.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from deployments.engine_client import EventQueue
from deployments.engine_handle import EngineHandle
from deployments.engine_info import EngineInfo
from deployments.errors import brief, is_hopeless, was_cancelled
from deployments.front import EngineReplica, FrontSource
from deployments.messages import ANYWHERE, GenerateRequest, Placed, ReplyAddress, Route
from deployments.parity import check_parity
from deployments.prefill import Prefilled, PromptComputer
from deployments.ray_errors import as_ours
from deployments.receipts import DecodeReceipt, PrefillReceipt, Timed
from deployments.replica_stats import Computed, no_prompts

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

# The first with the replica that the ingress chose, each other with one that Serve chooses; one that has died is not
# chosen again.
_MAX_PREFILLS = 3
_PREFILL_RETRY_S = 1.0
# A prefill replica says so at once when all of a prompt has arrived, and the first token takes no longer to come here.
_PREFILL_END_S = 1.0
_MAX_BEGINNINGS = 10_000


class RemotePrefill:
    """The prefill pool as decode sees it.

    Args:
        handle: of the prefill deployment.
        min_tokens: prompts with fewer uncached tokens are computed by the decode engine itself, unless their route says
            otherwise; None: all are, for there may be no prefill replica.
        peers: handle of the decode deployment, of which replicas may compute prompts as well; None: they never do.
    """

    def __init__(
        self, handle: "DeploymentHandle[Any]", min_tokens: int | None, peers: "DeploymentHandle[Any] | None" = None
    ) -> None:
        self._handle = handle
        self._min_tokens = min_tokens
        self._peers = peers
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

    def prefill(self, request: GenerateRequest, *arguments: object) -> Any:
        """Have the replica compute a prompt that its route names, whichever pool it is of; see `Prefill.prefill`."""
        handle = self._handle if self._peers is None or not request.route.by_peer else self._peers
        return handle.prefill.remote(request, *arguments)

    def note_silence(self) -> None:
        """A hand-off has cost its lease: the next ones shall not, until some replica answers again."""
        if self._return is None:
            logger.warning("the prefill pool does not answer: prompts are computed here until it does")
            self._return = asyncio.create_task(self._wait_for_answer())

    async def _wait_for_answer(self) -> None:
        while True:
            try:
                await self._handle.ready.remote()
                break
            except Exception as error:
                logger.warning("the prefill pool cannot serve: %s", brief(error))
                await asyncio.sleep(_PREFILL_RETRY_S)
        self._return = None
        logger.warning("the prefill pool answers again")


def own_deployment() -> "DeploymentHandle[Any]":
    """A handle of the deployment of which this process is a replica."""
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


class Beginnings:
    """First blocks of the prompts that came here.

    Of a prompt with another one an engine without a tier has nothing cached.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._known: dict[int, None] = {}

    def note(self, request: GenerateRequest) -> bool:
        """Remember a prompt's; whether it is new. One that was forgotten counts as new."""
        if request.num_given_tokens <= self._block_size:
            return True  # the block of the last token is computed in any case
        beginning = hash((request.cache_salt, request.given_token_ids[: self._block_size]))
        is_new = beginning not in self._known
        self._known.pop(beginning, None)
        self._known[beginning] = None
        if len(self._known) > _MAX_BEGINNINGS:
            del self._known[next(iter(self._known))]
        return is_new


class Decode(EngineReplica):
    """One decode replica.

    Args:
        engine: brings its engine into being.
        prefill: None: colocated, every prompt is computed here.
        min_tokens: see `RemotePrefill`.
        parity_check: before it serves, hand a prompt over and compare the tokens.
        peers: gives a handle of the replica's own deployment, see `RemotePrefill`.
    """

    async def __init__(  # type: ignore[misc]
        self,
        engine: FrontSource,
        prefill: "DeploymentHandle[Any] | None",
        min_tokens: int | None,
        parity_check: bool,
        peers: "Callable[[], DeploymentHandle[Any]] | None" = None,
    ) -> None:
        others = None if peers is None else peers()
        self._prefill = None if prefill is None else RemotePrefill(prefill, min_tokens, others)
        self._front = await engine.start()
        self._front.prompts = no_prompts()
        self._prompts = PromptComputer(self._front)
        self._beginnings = Beginnings(self._front.engine.info.block_size)
        self._num_unplaced = 0
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
        times, placed, prefills = None, None, list[PrefillReceipt]()
        begins_early = self._begins_early(request, remote_threshold)
        place = self._expect_place()
        handoff: asyncio.Task[None] | None = None

        def hand_off() -> asyncio.Task[None]:
            return asyncio.create_task(self._prefill_remotely(request, place, reply_to, events, prefills))

        try:
            # A task runs once this one waits: when the engine is asked.
            handoff = hand_off() if begins_early else None
            await engine.add(request, remote_threshold, reply_to)
            async for event in events:
                if isinstance(event, Placed):
                    placed = event
                    if is_again := place.done():
                        assert not event.remote, "a hand-off begins once"
                    else:
                        place.set_result(event)
                    if event.remote:
                        handoff = handoff or hand_off()
                    elif handoff is not None:
                        handoff.cancel()  # the engine computes the prompt
                        if is_again and self._prefill is not None:
                            self._prefill.note_silence()  # its lease ran out
                elif isinstance(event, Timed):
                    times = event.times
            if handoff is not None:  # a short answer ends before the prefill replica has heard that all has arrived
                await asyncio.wait([handoff], timeout=_PREFILL_END_S)
        finally:
            if handoff is not None:
                handoff.cancel()
            place.cancel()
            engine.close(request_id)
            self._count(request, placed, is_remote=handoff is not None)
        return DecodeReceipt(self._front.replica, times, tuple(prefills)) if request.wants_receipt else None

    def _count(self, request: GenerateRequest, placed: Placed | None, *, is_remote: bool) -> None:
        """A prompt is done with. One of a single token may end in the other pool before it has a place here."""
        if placed is None:
            where = Computed.PREFILL if is_remote else None
        elif placed.remote:
            where = Computed.PREFILL
        else:
            num_cached = placed.num_cached_tokens
            is_cached = 0 < num_cached >= request.num_given_tokens - self._front.engine.info.block_size
            where = Computed.CACHED if is_cached else Computed.DECODE
        if where is not None:
            self._front.prompts[where.value] += 1

    def _begins_early(self, request: GenerateRequest, remote_threshold: int | None) -> bool:
        """Whether its engine is sure to leave the whole prompt to the prefill pool, and does not let it wait."""
        is_new = self._beginnings.note(request)
        if self._prefill is None or remote_threshold is None or request.num_prompt_logprobs is not None:
            return False
        if request.generated_token_ids:
            return False  # it was lost once: a token shall come only from where others can follow
        if self._front.engine.info.has_tier:
            return False
        return is_new and self._num_unplaced == 0 and request.num_given_tokens >= remote_threshold

    def _expect_place(self) -> "asyncio.Future[Placed]":
        """A request is about to be asked for: it waits for its place until this is done, or cancelled."""
        place: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        self._num_unplaced += 1
        place.add_done_callback(self._note_place)
        return place

    def _note_place(self, _: "asyncio.Future[Placed]") -> None:
        self._num_unplaced -= 1

    async def prefill(
        self,
        request: GenerateRequest,
        first_block: int,
        target: EngineHandle,
        reply_to: ReplyAddress,
        kv: str = "",
        is_placed: bool = True,
    ) -> Prefilled:
        """Compute a prompt for another decode replica, as a prefill replica does; see `PromptComputer.prefill`.

        Whatever the role of this one: who asks goes by that, and may have heard of it a moment too early or too late.
        """
        return await self._prompts.prefill(request, first_block, target, reply_to, kv, is_placed)

    async def engine_info(self) -> EngineInfo:
        return self._front.engine.info

    async def _prefill_remotely(
        self,
        request: GenerateRequest,
        place: "asyncio.Future[Placed]",
        reply_to: ReplyAddress,
        events: EventQueue,
        receipts: list[PrefillReceipt],
    ) -> None:
        """Have the prompt computed by a prefill replica; if that fails, by another; in the end here.

        The first one begins even if there is no place yet. A request that no replica could do anything with fails.
        """
        assert self._prefill is not None, "placed remotely without a prefill pool"
        engine, request_id = self._front.engine, request.request_id
        for attempt in range(_MAX_PREFILLS):
            if attempt:
                await asyncio.shield(place)
                if not await engine.handle.renew(request_id):
                    return  # the lease ran out, and the engine computes it
            is_placed = place.done()
            first_block = place.result().num_cached_tokens // engine.info.block_size if is_placed else 0
            # Again not by the replica that has failed, if Serve finds another.
            asked = replace(request, route=ANYWHERE) if attempt else request
            call = self._prefill.prefill(asked, first_block, engine.handle, reply_to, engine.info.kv, is_placed)
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
        await asyncio.shield(place)
        logger.warning("%s: prefilling locally", request_id)
        await engine.handle.prefill_locally(request_id)
