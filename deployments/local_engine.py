"""An engine in the process of its front, asked as one in an actor is. For tests, and wherever Ray is not wanted."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from deployments.engine.engine import Engine
from deployments.engine.handoff.outbox import TakenHandoff
from deployments.engine.handoff.outgoing import End, Part, Word
from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats
from deployments.engine_builder import BuiltEngine
from deployments.engine_host import EngineHost
from deployments.engine_info import EngineInfo
from deployments.errors import TransferError
from deployments.messages import FrontEvent, GenerateRequest, ReplyAddress
from deployments.receipts import ChunkArrived

T = TypeVar("T")

# As many questions as an actor answers at once.
_NUM_THREADS = 16


class Answer(Generic[T]):
    """What is there to wait for. Whoever is cancelled while waiting leaves what was asked going on, as with Ray's."""

    def __init__(self, future: "Future[T]") -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, T]:
        answer = asyncio.wrap_future(self._future)
        # Whoever was cancelled looks at no failure that comes later.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return asyncio.shield(answer).__await__()


class LocalEngine:
    """See the module and `EngineHandle`. Made in the event loop of its front, and asked from any thread.

    Args:
        built: the engine.
    """

    def __init__(self, built: BuiltEngine) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[FrontEvent]] = asyncio.Queue()
        self._host = EngineHost(built, self._tell)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="local-engine")

    def info(self) -> Awaitable[EngineInfo]:
        return self._ask(lambda: self._host.info)

    def ping(self) -> Awaitable[None]:
        return self._ask_to_wait(self._host.ping)

    def stats(self) -> Awaitable[EngineStats]:
        return self._ask_to_wait(self._host.stats)

    def report(self, read: Position | None) -> Awaitable[tuple[EngineStats, CacheEvents]]:
        return self._ask_to_wait(self._host.report, read)

    def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> Awaitable[None]:
        return self._ask(self._host.add, request, remote_threshold, reply_to)

    def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> Awaitable[None]:
        return self._ask(self._host.prefill, request, first_block, reply_to)

    def prefill_locally(self, request_id: str) -> Awaitable[None]:
        return self._ask(self._host.prefill_locally, request_id)

    def renew(self, request_id: str) -> Awaitable[bool]:
        return self._ask_to_wait(self._host.renew, request_id)

    def abort(self, request_id: str, admission: Awaitable[None]) -> Awaitable[None]:
        return self._ask(lambda admitted: self._host.abort(request_id), admission)

    def take_handoff(self, request_id: str) -> Awaitable[TakenHandoff]:
        return self._ask(self._host.take_handoff, request_id)

    def receive_kv(self, request_id: str, handoff: Awaitable[TakenHandoff]) -> Awaitable[list[ChunkArrived]]:
        return self._answer_by(self._receive, (request_id, handoff))

    async def _receive(self, request_id: str, handoff: TakenHandoff) -> list[ChunkArrived]:
        with self._host.filling(handoff.release) as filling:
            async for part in self._parts(request_id, handoff):
                filling.add(part.chunk, part.kv, time.monotonic(), num_parts=part.num_parts)
            return await self._event_loop.run_in_executor(self._threads, filling.finish)

    async def _parts(self, request_id: str, handoff: TakenHandoff) -> AsyncIterator[Part]:
        """All of a hand-off, as it is complete.

        Raises:
            TransferError: it is over before.
        """
        words = asyncio.Queue[Word]()
        handoff.watch(lambda word: self._event_loop.call_soon_threadsafe(words.put_nowait, word))
        while isinstance(word := await words.get(), Part):
            yield word
        if word is End.GONE:
            raise TransferError(f"{request_id}: the hand-off is gone")

    async def events(self) -> AsyncIterator[list[FrontEvent]]:
        while True:
            yield await self._events.get()

    async def run(self, command: Callable[[Engine], T]) -> T:
        """Have the engine do anything else, between two steps."""
        return await asyncio.wrap_future(self._host.submit(command))

    def stop(self) -> None:
        """End the engine; nothing may be asked any more."""
        self._host.stop()
        self._threads.shutdown()

    def _ask(self, method: Callable[..., T], *arguments: object) -> Answer[T]:
        """What is done at once, in the order in which it was asked."""

        async def do(*known: object) -> T:
            return method(*known)

        return self._answer_by(do, arguments)

    def _ask_to_wait(self, method: Callable[..., T], *arguments: object) -> Answer[T]:
        """What has to wait for the engine, and so takes a thread."""

        async def do(*known: object) -> T:
            return await self._event_loop.run_in_executor(self._threads, method, *known)

        return self._answer_by(do, arguments)

    def _answer_by(self, do: Callable[..., Awaitable[T]], arguments: tuple[object, ...]) -> Answer[T]:
        async def answer() -> T:
            known = [await argument if isinstance(argument, Answer) else argument for argument in arguments]
            await self._reach()
            return await do(*known)

        return Answer(asyncio.run_coroutine_threadsafe(answer(), self._event_loop))

    async def _reach(self) -> None:
        """Nothing is in the way; tests put something there."""

    def _tell(self, events: list[FrontEvent]) -> None:
        self._event_loop.call_soon_threadsafe(self._events.put_nowait, events)
