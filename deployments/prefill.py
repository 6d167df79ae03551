"""The prefill pool: computes prompts and hands their KV to a decode engine, chunk by chunk, while it computes on.

Called by decode fronts, which do the same for others where they are told to (`Decode.prefill`). Owns the reference to
each hand-off, which it passes on as soon as its engine has accepted the prompt: when this front or its engine goes, the
chunks go.
"""

import asyncio
import time
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deployments.engine_client import EventQueue
from deployments.engine_handle import EngineHandle
from deployments.errors import LayoutMismatchError, TransferError
from deployments.front import EngineFront, EngineReplica, FrontSource
from deployments.messages import GenerateRequest, HandoffOpened, ReplyAddress
from deployments.receipts import ChunkArrived, EngineTimes, HandoffArrived, HandoffReceipt, PrefillReceipt, Timed

if TYPE_CHECKING:
    from deployments.engine.handoff.outbox import TakenHandoff

# An answer may be late, behind a long step.
_RENEWALS_PER_LEASE = 3
# An engine that takes longer hangs or is dead.
_ABORT_TIMEOUT_S = 1.0
# A few times per step.
_PLACE_POLL_S = 0.003


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt is computed.

    Attributes:
        has_finished: its first token was the last one, so that there was nothing to hand over.
        receipt: for a request that wants one.
    """

    has_finished: bool
    receipt: PrefillReceipt | None = None


class HandoffTimer:
    """Times the chunks of one hand-off: what is hidden of it ends when the engine has told its times."""

    def __init__(self) -> None:
        self._all_ready_s = 0.0
        self._num_bytes = 0
        self._sends: list[tuple[float, float]] = []

    def all_ready(self) -> None:
        """The whole prompt is computed."""
        self._all_ready_s = time.monotonic()

    def arrived(self, chunks: Iterable[ChunkArrived]) -> None:
        """All chunks are there; the answer that says so has just come."""
        now_s = time.monotonic()
        for chunk in chunks:
            arrived_s = now_s - chunk.ago_s
            self._num_bytes += chunk.num_bytes
            self._sends.append((arrived_s - chunk.seconds, arrived_s))

    def receipt(self) -> HandoffReceipt:
        """Once all have arrived."""
        hidden_s, covered_s = 0.0, 0.0
        for started_s, arrived_s in sorted(self._sends):
            until_s = min(arrived_s, self._all_ready_s)
            hidden_s += max(0.0, until_s - max(started_s, covered_s))
            covered_s = max(covered_s, until_s)
        last_s = max(arrived_s for _, arrived_s in self._sends)
        return HandoffReceipt(self._num_bytes, hidden_s, max(0.0, last_s - self._all_ready_s))


class PromptComputer:
    """Has a replica's engine compute prompts for others, and hands them over.

    Args:
        front: of the replica.
    """

    def __init__(self, front: EngineFront) -> None:
        self._front = front

    async def prefill(
        self,
        request: GenerateRequest,
        first_block: int,
        target: EngineHandle,
        reply_to: ReplyAddress,
        kv: str = "",
        is_placed: bool = True,
    ) -> Prefilled:
        """Compute a prompt for another engine; returns when the target has every block.

        Args:
            request: the prompt.
            first_block: leading blocks that the target already holds.
            target: the decode engine, which reserves blocks for the request.
            reply_to: where the first token goes, as soon as it is drawn.
            kv: of the target, see `EngineInfo`; empty: it is found out when the KV arrives.
            is_placed: whether the target has reserved the blocks already; else nothing is passed on before it has.

        Raises:
            TransferError or a Ray error: something did not arrive, or the target waits no longer. A target that waits
                keeps its reservation: the prompt may be computed again, here or elsewhere.
            LayoutMismatchError: the engines do not agree on what a block is.
        """
        engine, request_id = self._front.engine, request.request_id
        self._check(request_id, kv)
        events = engine.open(request_id)
        keeper = asyncio.create_task(self._keep_leases(request_id, target, events))
        place = asyncio.create_task(_await_place(request_id, target, is_placed))
        place.add_done_callback(lambda done: done.cancelled() or done.exception())  # its hand-off says so
        tasks, times, sent, has_arrived = [keeper, place], None, HandoffTimer(), False
        try:
            await engine.prefill(replace(request, wants_receipt=True), first_block, reply_to)
            async for event in events:
                if isinstance(event, Timed):
                    times = event.times
                    sent.all_ready()
                elif isinstance(event, HandoffOpened):
                    tasks.append(asyncio.create_task(self._send(request_id, target, events, place)))
                elif isinstance(event, HandoffArrived):
                    has_arrived = True
                    sent.arrived(event.chunks)
                if has_arrived and times is not None:
                    break
            else:
                return Prefilled(True, self._receipt(request, times))
            self._front.handoff.note_whole(handed_over := sent.receipt())
        except Exception:
            self._front.handoff.num_failures += 1
            await self._abort(request_id)
            raise
        finally:
            for task in tasks:
                task.cancel()
            engine.close(request_id)
        return Prefilled(False, self._receipt(request, times, handed_over))

    def _check(self, request_id: str, kv: str) -> None:
        """Refuse what cannot be handed over before anything is computed: its first token goes to the client at once."""
        engine = self._front.engine
        if kv and kv != engine.info.kv:
            raise LayoutMismatchError(f"engines disagree on the layout of KV: ours {engine.info.kv}, theirs {kv}")
        if engine.serves(request_id):
            raise TransferError(f"{request_id}: this replica serves it already, and hands prompts over to others alone")

    async def _abort(self, request_id: str) -> None:
        """End a hand-off on the engine, and wait for that: the same replica may be asked again at once."""
        engine = self._front.engine
        if (aborted := engine.close(request_id)) is not None:
            with suppress(Exception):
                async with asyncio.timeout(_ABORT_TIMEOUT_S):
                    await aborted
                    # Answered between two steps, behind the abort: no step tells of this hand-off any more.
                    await engine.handle.renew(request_id)

    def _receipt(
        self, request: GenerateRequest, times: EngineTimes | None, handoff: HandoffReceipt | None = None
    ) -> PrefillReceipt | None:
        if times is None or not request.wants_receipt:
            return None
        return PrefillReceipt(self._front.replica, times, handoff)

    async def _keep_leases(self, request_id: str, target: EngineHandle, events: EventQueue) -> None:
        """Renew the lease on both engines for as long as both answer."""
        source = self._front.engine
        while True:
            await asyncio.sleep(source.info.lease_s / _RENEWALS_PER_LEASE)
            try:
                if not await target.renew(request_id):
                    events.put(TransferError(f"{request_id}: the decode engine waits for it no longer"))
                    return
                if not await source.handle.renew(request_id):
                    events.put(TransferError(f"{request_id}: the prefill engine holds nothing for it any more"))
                    return
            except Exception as error:
                events.put(error)
                return

    async def _send(
        self, request_id: str, target: EngineHandle, events: EventQueue, place: "asyncio.Task[None]"
    ) -> None:
        try:
            await asyncio.shield(place)
            # In a thread: the first contact of two engines can hold up the call.
            # `taken` keeps the chunks until they have arrived.
            taken, received = await asyncio.to_thread(_submit, request_id, self._front.engine.handle, target)
            chunks = await received
        except Exception as error:
            # Nobody may read it for long, and its traceback would keep this frame with the chunks.
            taken = None
            await self._note_failure(request_id, error.with_traceback(None), events)
            return
        del taken
        for chunk in chunks:
            self._front.handoff.observe(chunk.num_blocks, chunk.num_bytes, chunk.seconds)
        events.put(HandoffArrived(request_id, tuple(chunks)))

    async def _note_failure(self, request_id: str, error: Exception, events: EventQueue) -> None:
        """Something did not arrive. If our engine has dropped the hand-off, it says itself why: with its end, say."""
        try:
            is_held = await self._front.engine.handle.renew(request_id)
        except Exception as death:
            events.put(death)
        else:
            if is_held:
                events.put(error)


class Prefill(EngineReplica):
    """One prefill replica.

    Args:
        engine: brings its engine into being.
    """

    async def __init__(self, engine: FrontSource) -> None:  # type: ignore[misc]
        self._front = await engine.start()
        self._prompts = PromptComputer(self._front)

    async def prefill(
        self,
        request: GenerateRequest,
        first_block: int,
        target: EngineHandle,
        reply_to: ReplyAddress,
        kv: str = "",
        is_placed: bool = True,
    ) -> Prefilled:
        """See `PromptComputer.prefill`; decode fronts call it."""
        return await self._prompts.prefill(request, first_block, target, reply_to, kv, is_placed)


async def _await_place(request_id: str, target: EngineHandle, is_placed: bool) -> None:
    """Return once the target has reserved blocks; KV that came before would be ignored.

    It is asked again and again: the prompt is computed meanwhile, and a target without room is given up by the leases.
    """
    while not is_placed:
        is_placed = await target.renew(request_id)
        if not is_placed:
            await asyncio.sleep(_PLACE_POLL_S)


def _submit(
    request_id: str, source: EngineHandle, target: EngineHandle
) -> "tuple[Awaitable[TakenHandoff], Awaitable[list[ChunkArrived]]]":
    """What becomes the hand-off at its source, and of its arrival at the target."""
    taken = source.take_handoff(request_id)
    return taken, target.receive_kv(request_id, taken)
