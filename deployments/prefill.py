"""The prefill pool: computes prompts and hands their KV to a decode engine, chunk by chunk, while it computes on.

Called by decode fronts. Owns every reference to a chunk: when this front or its engine goes, the chunks go.
"""

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from deployments.engine.config import EngineConfig
from deployments.engine_builder import EngineBuilder, build_engine
from deployments.engine_client import EventQueue
from deployments.engine_info import EngineResources
from deployments.errors import TransferError
from deployments.front import EngineFront
from deployments.messages import ChunkArrived, ChunkReady, Ended, GenerateRequest, ReplyAddress
from deployments.replica_stats import ReplicaStats

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from torch import Tensor

# An answer may be late, behind a long step.
_RENEWALS_PER_LEASE = 3
# An engine that takes longer hangs or is dead.
_ABORT_TIMEOUT_S = 1.0


class Prefill:
    """One prefill replica.

    Args:
        config: of its engine.
        resources: of its engine.
        build: makes the engine.
    """

    async def __init__(  # type: ignore[misc]
        self, config: EngineConfig, resources: EngineResources, build: EngineBuilder = build_engine
    ) -> None:
        self._front = await EngineFront.start(config, resources, build)

    async def prefill(
        self, request: GenerateRequest, first_block: int, target: "ActorHandle[Any]", reply_to: ReplyAddress
    ) -> bool:
        """Compute a prompt for another engine; returns when the target has every block.

        Args:
            request: the prompt.
            first_block: leading blocks that the target already holds.
            target: the decode engine, which has reserved blocks for the request.
            reply_to: where the first token goes, as soon as it is drawn.

        Returns:
            Whether the first token was the last one, so that there is nothing to hand over.

        Raises:
            TransferError or a Ray error: some chunk did not arrive, or the target waits no longer. A target that waits
                keeps its reservation: the prompt may be computed again, here or elsewhere.
            LayoutMismatchError: the engines do not agree on what a block is.
        """
        engine, request_id = self._front.engine, request.request_id
        events = engine.open(request_id)
        keeper = asyncio.create_task(self._keep_leases(request_id, target, events))
        sends: list[asyncio.Task[None]] = []
        num_arrived, num_chunks = 0, None
        try:
            await engine.prefill(request, first_block, reply_to)
            async for event in events:
                if isinstance(event, ChunkReady):
                    sends.append(asyncio.create_task(self._send(event, target, events)))
                    if event.first_token is not None:
                        num_chunks = len(sends)
                elif isinstance(event, ChunkArrived):
                    num_arrived += 1
                elif isinstance(event, Ended):
                    if event.loss is not None:
                        raise TransferError(f"{request_id}: {event.loss}")
                    return True
                if num_arrived == num_chunks:
                    break
            self._front.handoff.num_requests += 1
        except Exception:
            self._front.handoff.num_failures += 1
            # The same replica may be asked again at once.
            if (aborted := engine.close(request_id)) is not None:
                with suppress(Exception):
                    await asyncio.wait_for(aborted, _ABORT_TIMEOUT_S)
            raise
        finally:
            keeper.cancel()
            for send in sends:
                send.cancel()
            engine.close(request_id)
        return False

    async def stats(self) -> ReplicaStats:
        return await self._front.stats()

    async def ready(self) -> None:
        """Return once the engine can serve; see `EngineFront.ready`."""
        await self._front.ready()

    async def check_health(self) -> None:
        await self._front.check_health()

    async def _keep_leases(self, request_id: str, target: "ActorHandle[Any]", events: EventQueue) -> None:
        """Renew the lease on both engines for as long as both answer."""
        source = self._front.engine
        while True:
            await asyncio.sleep(source.info.lease_s / _RENEWALS_PER_LEASE)
            try:
                if not await source.detached(target.renew.remote, request_id):
                    events.put(TransferError(f"{request_id}: the decode engine waits for it no longer"))
                    return
                if not await source.renew(request_id):
                    events.put(TransferError(f"{request_id}: the prefill engine holds nothing for it any more"))
                    return
            except Exception as error:
                events.put(error)
                return

    async def _send(self, chunk: ChunkReady, target: "ActorHandle[Any]", events: EventQueue) -> None:
        source, started_s = self._front.engine, time.monotonic()

        def submit() -> "tuple[ObjectRef[Tensor], ObjectRef[None]]":
            taken: ObjectRef[Tensor] = source.actor.take_chunk.remote(chunk.request_id, chunk.index)
            return taken, target.receive_kv.remote(chunk, taken)

        try:
            # In a thread: the first contact of two engines can hold up the call.
            # `taken` keeps the chunk until it has arrived.
            taken, received = await asyncio.to_thread(source.detached, submit)
            await received
        except Exception as error:
            events.put(error)
            return
        del taken
        self._front.handoff.observe(chunk.num_blocks * source.info.bytes_per_block, time.monotonic() - started_s)
        source.detached(source.actor.release_chunk.remote, chunk.request_id, chunk.index)
        events.put(ChunkArrived(chunk.request_id))
