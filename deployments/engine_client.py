"""A front's side of its engine: sends messages to the actor and sorts its events by request. Tokens go elsewhere."""

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from deployments.engine.stats import EngineStats
from deployments.engine_info import EngineInfo
from deployments.errors import EngineDeadError
from deployments.messages import FrontEvent, GenerateRequest, ReplyAddress

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class EventQueue:
    """Events of one request, in order. An error that is put in is raised to the reader: `EngineDeadError`, say."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[FrontEvent | Exception] = asyncio.Queue()

    def put(self, event: FrontEvent | Exception) -> None:
        self._queue.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[FrontEvent]:
        return self

    async def __anext__(self) -> FrontEvent:
        event = await self._queue.get()
        if isinstance(event, Exception):
            raise event
        return event


class EngineClient:
    """Owns the connection to one engine actor; lives in the front's event loop.

    Args:
        actor: the engine, loaded.
        info: what it said of itself.
        on_death: called once when the engine is found dead or is given up, after every reader was told.
    """

    def __init__(self, actor: "ActorHandle[Any]", info: EngineInfo, on_death: Callable[[], None]) -> None:
        self.actor = actor
        self.info = info
        self._on_death = on_death
        self._queues: dict[str, EventQueue] = {}
        self._admissions: dict[str, ObjectRef[None]] = {}
        self._death: str | None = None
        self._context = contextvars.copy_context()
        self._pump = asyncio.create_task(self._distribute())

    def detached(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something that submits actor tasks, so that they outlive the request that asks for them.

        When a client leaves, Serve cancels the replica's task, and Ray with it every task submitted on its behalf: also
        the abort that was to free the request's blocks. Ray finds those by a context variable, so here the call runs
        in the context that the client was built in.
        """
        return self._context.copy().run(call, *args, **kwargs)

    def open(self, request_id: str) -> EventQueue:
        """Start listening for a request's events; before the engine hears of the request."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        events = self._queues[request_id] = EventQueue()
        return events

    def close(self, request_id: str) -> "ObjectRef[None] | None":
        """Stop listening and end the request on the engine; does not wait. Idempotent.

        Also one that has ended there: chunks of its prompt may still wait to be taken.

        Returns:
            What is there when the engine holds nothing of the request any more; None: it never did.
        """
        self._queues.pop(request_id, None)
        admission = self._admissions.pop(request_id, None)
        if admission is None:
            return None
        # The actor's threads may overtake each other; as an argument the admission goes first. If it was refused there
        # is nothing to abort, and this call fails unheard.
        aborted: ObjectRef[None] = self.detached(self.actor.abort.remote, request_id, admission)
        return aborted

    async def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> None:
        """Have the engine decode a request; see `Engine.add`."""
        await self._admit(request, self.detached(self.actor.add.remote, request, remote_threshold, reply_to))

    async def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> None:
        """Have the engine compute a prompt for another; see `Engine.prefill`."""
        await self._admit(request, self.detached(self.actor.prefill.remote, request, first_block, reply_to))

    async def _admit(self, request: GenerateRequest, admission: "ObjectRef[None]") -> None:
        self._admissions[request.request_id] = admission
        await admission

    async def prefill_locally(self, request_id: str) -> None:
        await self.detached(self.actor.prefill_locally.remote, request_id)

    async def renew(self, request_id: str) -> bool:
        """Renew the lease of a hand-off; False: the engine holds nothing for it any more."""
        is_held: bool = await self.detached(self.actor.renew.remote, request_id)
        return is_held

    async def stats(self) -> EngineStats:
        stats: EngineStats = await self.actor.stats.remote()
        return stats

    async def check_health(self, timeout_s: float) -> None:
        """Have the engine run a token, or show that it runs others.

        Raises:
            EngineDeadError: its process is gone, its loop has ended, its model fails, or it does not answer in time.
                The engine is given up with that: its requests fail, so that they can go on elsewhere.
        """
        if self._death is None:
            try:
                await asyncio.wait_for(self.actor.ping.remote(), timeout_s)
            except TimeoutError:
                self._give_up(f"it has not answered for {timeout_s:g} s")
            except Exception as error:
                self._give_up(str(error))
        if self._death is not None:
            raise EngineDeadError(self._death)

    async def _distribute(self) -> None:
        reason = "its event stream ended"
        try:
            async for ref in self.actor.events.options(num_returns="streaming").remote():
                for event in await ref:
                    if (events := self._queues.get(event.request_id)) is not None:
                        events.put(event)
        except Exception as error:
            reason = str(error)
        self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        if self._death is not None:
            return
        self._death = f"the engine died: {reason}"
        logger.error("%s", self._death)
        for events in self._queues.values():
            events.put(EngineDeadError(self._death))  # one each: raising an error adds to its traceback
        self._on_death()
