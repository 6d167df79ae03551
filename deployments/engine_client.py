"""A front's side of its own engine: admits requests to it, sorts its events by request, finds out when it is dead."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from deployments.engine_handle import EngineHandle
from deployments.engine_info import EngineInfo
from deployments.errors import EngineDeadError, brief
from deployments.messages import Ended, FrontEvent, GenerateRequest, ReplyAddress

logger = logging.getLogger(__name__)


class EventQueue:
    """Events of one request, in order, until the engine is done with it: that ends the iteration.

    An error that is put in is raised to the reader: `EngineDeadError`, say. So is the reason why the engine gave the
    request up.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[FrontEvent | Exception | None] = asyncio.Queue()

    def put(self, event: FrontEvent | Exception) -> None:
        self._queue.put_nowait(event)

    def finish(self) -> None:
        """Nothing more comes, though this engine is not done with the request: another one has drawn its last token."""
        self._queue.put_nowait(None)

    def __aiter__(self) -> AsyncIterator[FrontEvent]:
        return self

    async def __anext__(self) -> FrontEvent:
        event = await self._queue.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Ended) and event.loss is not None:
            raise event.loss
        if event is None or isinstance(event, Ended):
            raise StopAsyncIteration
        return event


class EngineClient:
    """Owns the connection to one engine; lives in the front's event loop.

    Args:
        handle: of the engine, loaded.
        info: what it said of itself.
        on_death: called once when the engine is found dead or is given up, after every reader was told.
    """

    def __init__(self, handle: EngineHandle, info: EngineInfo, on_death: Callable[[], None]) -> None:
        self.handle = handle
        self.info = info
        self._on_death = on_death
        self._queues: dict[str, EventQueue] = {}
        self._admissions: dict[str, Awaitable[None]] = {}
        self._death: str | None = None
        self._pump = asyncio.create_task(self._distribute())

    @property
    def is_dead(self) -> bool:
        """Whether the engine was found dead, or given up."""
        return self._death is not None

    def serves(self, request_id: str) -> bool:
        """Whether somebody listens for a request's events."""
        return request_id in self._queues

    def open(self, request_id: str) -> EventQueue:
        """Start listening for a request's events; before the engine hears of the request."""
        if self._death is not None:
            raise EngineDeadError(self._death)
        events = self._queues[request_id] = EventQueue()
        return events

    def close(self, request_id: str) -> Awaitable[None] | None:
        """Stop listening and end the request on the engine; does not wait. Idempotent.

        Also one that has ended there: chunks of its prompt may still wait to be taken.

        Returns:
            What is there when the engine holds nothing of the request any more; None: it never did.
        """
        self._queues.pop(request_id, None)
        admission = self._admissions.pop(request_id, None)
        # If the admission was refused there is nothing to abort, and this call fails unheard.
        return None if admission is None else self.handle.abort(request_id, admission)

    async def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> None:
        """Have the engine decode a request; see `Engine.add`."""
        await self._admit(request, self.handle.add(request, remote_threshold, reply_to))

    async def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> None:
        """Have the engine compute a prompt for another; see `Engine.prefill`."""
        await self._admit(request, self.handle.prefill(request, first_block, reply_to))

    async def _admit(self, request: GenerateRequest, admission: Awaitable[None]) -> None:
        self._admissions[request.request_id] = admission
        await admission

    async def check_health(self, timeout_s: float) -> None:
        """Have the engine run a token, or show that it runs others.

        Raises:
            EngineDeadError: its process is gone, its loop has ended, its model fails, or it does not answer in time.
                The engine is given up with that: its requests fail, so that they can go on elsewhere.
        """
        if self._death is None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.handle.ping()
            except TimeoutError:
                self._give_up(f"it has not answered for {timeout_s:g} s")
            except Exception as error:
                self._give_up(brief(error), str(error))
        if self._death is not None:
            raise EngineDeadError(self._death)

    async def _distribute(self) -> None:
        reason = details = "its event stream ended"
        try:
            async for batch in self.handle.events():
                for event in batch:
                    if (events := self._queues.get(event.request_id)) is not None:
                        events.put(event)
        except Exception as error:
            reason, details = brief(error), str(error)
        self._give_up(reason, details)

    def _give_up(self, reason: str, details: str = "") -> None:
        """Clients are told the reason; the log has the details, Ray's traceback among them."""
        if self._death is not None:
            return
        self._death = f"the engine died: {reason}"
        logger.error("the engine died: %s", details or reason)
        for events in self._queues.values():
            events.put(EngineDeadError(self._death))  # one each: raising an error adds to its traceback
        self._on_death()
