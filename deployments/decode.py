"""The decode pool: owns a request from its admission to its last token.

Called by the ingress. Its engine reserves KV blocks first; then a prefill replica fills them, or, where the prompt is
short, mostly cached, or there is no prefill pool, the engine computes the prompt itself.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deployments.engine.config import EngineConfig
from deployments.engine_actor import EngineInfo, EngineResources
from deployments.engine_client import EventQueue
from deployments.front import EngineFront
from deployments.messages import GenerateRequest, Placed, TokenOutput
from deployments.metrics import ReplicaStats

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """The prefill pool as decode sees it.

    Attributes:
        handle: of the prefill deployment.
        min_tokens: prompts with fewer uncached tokens are computed by the decode engine itself.
    """

    handle: "DeploymentHandle[Any]"
    min_tokens: int


class Decode:
    """One decode replica.

    Args:
        config: of its engine.
        resources: of its engine.
        prefill: None: colocated, every prompt is computed here.
    """

    async def __init__(  # type: ignore[misc]
        self, config: EngineConfig, resources: EngineResources, prefill: "DeploymentHandle[Any] | None", min_tokens: int
    ) -> None:
        self._prefill = None if prefill is None else RemotePrefill(prefill, min_tokens)
        self._front = await EngineFront.start(config, resources)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """Continue a prompt; closing or cancelling the generator ends the request on both pools.

        Yields:
            The generated tokens in order, each once.

        Raises:
            InvalidRequestError: the request can never run.
            EngineDeadError: this replica's engine died.
        """
        engine, request_id = self._front.engine, request.request_id
        events = engine.open(request_id)
        handoff: asyncio.Task[None] | None = None
        num_cached_tokens = num_sent = 0
        try:
            await engine.add(request, self._prefill.min_tokens if self._prefill else None)
            async for event in events:
                if isinstance(event, Placed):
                    num_cached_tokens = event.num_cached_tokens
                    if event.remote:
                        handoff = asyncio.create_task(self._prefill_remotely(request, event, events))
                elif isinstance(event, TokenOutput) and event.index == num_sent:
                    # The first token comes from the prefill pool and again, with the KV, from our own engine.
                    num_sent += len(event.token_ids)
                    yield replace(event, num_cached_tokens=max(num_cached_tokens, event.num_cached_tokens))
                    if event.finish_reason is not None:
                        return
        finally:
            if handoff is not None:
                handoff.cancel()
            engine.close(request_id)

    async def engine_info(self) -> EngineInfo:
        return self._front.engine.info

    async def stats(self) -> ReplicaStats:
        return await self._front.stats()

    async def ready(self) -> None:
        """Return once the engine can serve."""
        await self._front.check_health()

    async def check_health(self) -> None:
        await self._front.check_health()

    async def _prefill_remotely(self, request: GenerateRequest, placed: Placed, events: EventQueue) -> None:
        """Have the prompt computed by a prefill replica; if that fails for any reason, compute it here."""
        assert self._prefill is not None, "placed remotely without a prefill pool"
        engine = self._front.engine
        first_block = placed.num_cached_tokens // engine.info.block_size
        prefill = self._prefill.handle.options(stream=True).prefill
        stream: Any = prefill.remote(request, first_block, engine.actor)
        has_ended = False
        try:
            async for output in stream:
                events.put(output)
            has_ended = True
        except Exception:
            self._front.handoff.num_failures += 1
            logger.exception("%s: remote prefill failed, prefilling locally", request.request_id)
            await engine.prefill_locally(request.request_id)
        finally:
            if not has_ended:
                stream.cancel()
