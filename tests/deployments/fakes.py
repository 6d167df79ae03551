"""Both fronts in one process: real engines on a tiny model, with what Ray does in between replaced by plain calls."""

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, Callable
from typing import Any

from torch import Tensor

from deployments.decode import Decode
from deployments.engine.engine import Engine
from deployments.engine.runner import EngineLoop
from deployments.engine_actor import EngineInfo, EngineResources
from deployments.engine_client import EngineClient
from deployments.front import EngineFront
from deployments.messages import ChunkReady, EngineEvent, GenerateRequest
from deployments.prefill import Prefill
from tests.engine.driving import build_engine
from tests.engine.families import load


class RemoteMethod:
    """Looks like an actor's method: `.remote()` runs it in order with all others, and gives something to await."""

    def __init__(self, actor: "LocalActor", method: Callable[..., Any]) -> None:
        self._actor = actor
        self._method = method

    def options(self, **_: Any) -> "RemoteMethod":
        return self

    def remote(self, *args: Any) -> Any:
        if self._method.__name__ == "_events":
            return self._method(*args)

        async def run() -> Any:
            resolved = [await arg if isinstance(arg, LocalRef) else arg for arg in args]
            if self._actor.death is not None:
                raise self._actor.death
            return await self._method(*resolved)

        return LocalRef(asyncio.run_coroutine_threadsafe(run(), self._actor.event_loop))


class LocalRef:
    """Looks like an object reference: to await, or to pass on as an argument that is resolved first."""

    def __init__(self, future: "concurrent.futures.Future[Any]") -> None:
        self._future = future

    def __await__(self) -> Any:
        return asyncio.wrap_future(self._future).__await__()


class LocalActor:
    """An engine behind the interface of `EngineActor`'s handle."""

    def __init__(self, **overrides: object) -> None:
        self.event_loop = asyncio.get_running_loop()
        self.engine: Engine = build_engine(load("llama"), **overrides)
        self.death: Exception | None = None
        self.fail_receives = 0
        self._queue: asyncio.Queue[list[EngineEvent] | Exception] = asyncio.Queue()
        self.loop = EngineLoop(self.engine, self._emit)

    def __getattr__(self, name: str) -> RemoteMethod:
        return RemoteMethod(self, object.__getattribute__(self, f"_{name}"))

    def _emit(self, events: list[EngineEvent]) -> None:
        self.event_loop.call_soon_threadsafe(self._queue.put_nowait, events)

    def die(self) -> None:
        """As if the process had been killed."""
        self.death = ConnectionError("the engine's process is gone")
        self._queue.put_nowait(self.death)

    async def _command(self, command: Callable[[Engine], Any]) -> Any:
        return await asyncio.wrap_future(self.loop.submit(command))

    async def _info(self) -> EngineInfo:
        limits = self.engine.limits
        return EngineInfo("tiny", limits.max_model_len, 512, (), limits.block_size, 1024)

    async def _ping(self) -> None:
        await self._command(lambda engine: None)

    async def _stats(self) -> Any:
        return await self._command(lambda engine: engine.stats())

    async def _add(self, request: GenerateRequest, threshold: int | None) -> None:
        self.engine.check(request)
        await self._command(lambda engine: engine.add(request, threshold))

    async def _prefill(self, request: GenerateRequest, first_block: int) -> None:
        self.engine.check(request)
        await self._command(lambda engine: engine.prefill(request, first_block))

    async def _prefill_locally(self, request_id: str) -> None:
        await self._command(lambda engine: engine.prefill_locally(request_id))

    async def _abort(self, request_id: str, admission: None) -> None:
        await self._command(lambda engine: engine.abort(request_id))

    async def _take_chunk(self, request_id: str, index: int) -> Any:
        return self.engine.take_chunk(request_id, index)

    async def _release_chunk(self, request_id: str, index: int) -> None:
        await self._command(lambda engine: engine.release_chunk(request_id, index))

    async def _receive_kv(self, chunk: ChunkReady, tensor: Tensor) -> None:
        if self.fail_receives:
            self.fail_receives -= 1
            raise ConnectionError("the transfer broke")
        await self._command(lambda engine: self.loop.emit(engine.import_chunk(chunk, tensor)))

    async def _events(self) -> AsyncGenerator[Any, None]:
        while True:
            events = await self._queue.get()
            if isinstance(events, Exception):
                raise events
            yield _done(events)


def _done(value: Any) -> "asyncio.Future[Any]":
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


class Stream:
    """What a Serve handle returns for a streaming call: runs ahead of its reader, and can be cancelled."""

    def __init__(self, generator: AsyncGenerator[Any, None]) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run(generator))

    async def _run(self, generator: AsyncGenerator[Any, None]) -> None:
        error: BaseException = StopAsyncIteration()
        try:
            async for item in generator:
                self._items.put_nowait((item, None))
        except BaseException as raised:
            error = raised
        finally:
            await generator.aclose()
            self._items.put_nowait((None, error))

    def cancel(self) -> None:
        self._task.cancel()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        item, error = await self._items.get()
        if error is not None:
            raise error
        return item


class PrefillHandle:
    """A Serve handle of the prefill deployment with one replica."""

    def __init__(self, replica: Prefill) -> None:
        self._replica = replica

    def options(self, stream: bool) -> "PrefillHandle":
        assert stream
        return self

    @property
    def prefill(self) -> "PrefillHandle":
        return self

    def remote(self, *args: Any) -> Stream:
        return Stream(self._replica.prefill(*args))


class Pools:
    """One prefill and one decode replica. Build with `start`."""

    prefill_actor: LocalActor
    decode_actor: LocalActor
    prefill: Prefill
    decode: Decode

    @classmethod
    async def start(cls, monkeypatch: Any, min_tokens: int = 16, **overrides: object) -> "Pools":
        pools = cls()
        pools.prefill_actor, pools.decode_actor = LocalActor(**overrides), LocalActor(**overrides)
        actors = iter([pools.prefill_actor, pools.decode_actor])

        async def start(config: Any, resources: Any) -> EngineFront:
            return EngineFront(await EngineClient.connect(next(actors)))  # type: ignore[arg-type]

        monkeypatch.setattr(EngineFront, "start", start)
        resources = EngineResources(1, 0, {})
        pools.prefill, pools.decode = Prefill.__new__(Prefill), Decode.__new__(Decode)
        await pools.prefill.__init__(None, resources)  # type: ignore[misc]  # as Serve does with an async constructor
        await pools.decode.__init__(None, resources, PrefillHandle(pools.prefill), min_tokens)  # type: ignore[misc]
        return pools

    @property
    def actors(self) -> tuple[LocalActor, LocalActor]:
        return self.prefill_actor, self.decode_actor

    async def wait_idle(self) -> None:
        """Return when no engine holds anything; the test's own timeout bounds it."""
        for actor in self.actors:
            # An engine tells nobody that it is idle.
            while not await actor._command(_is_idle):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def stop(self) -> None:
        for actor in self.actors:
            actor.loop.stop()


def _is_idle(engine: Engine) -> bool:
    engine.check_integrity()
    stats = engine.stats()
    return engine.num_sequences == 0 and stats.num_used_blocks == 0 and stats.num_exported_blocks == 0
