"""Ingress and both fronts in one process: real engines on a tiny model, a real token channel, plain calls for Ray's."""

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from torch import Tensor

from deployments.admission import Admission, Bounds
from deployments.decode import Decode
from deployments.engine.engine import Engine
from deployments.engine.runner import EngineLoop
from deployments.engine_actor import EngineInfo, EngineResources
from deployments.engine_client import EngineClient
from deployments.front import EngineFront
from deployments.ingress import PoolBackend
from deployments.messages import ChunkReady, Ended, EngineEvent, FrontEvent, GenerateRequest, ReplyAddress, TokenOutput
from deployments.prefill import Prefill
from deployments.tokens.receiver import TokenReceiver, TokenStream
from deployments.tokens.sender import TokenSender
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
    """Looks like an object reference: to await, or to pass on as an argument that is resolved first.

    As with Ray's, whoever is cancelled while waiting for it leaves the task running.
    """

    def __init__(self, future: "concurrent.futures.Future[Any]") -> None:
        self._future = future

    def __await__(self) -> Any:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()


class LocalActor:
    """An engine behind the interface of `EngineActor`'s handle."""

    def __init__(self, **overrides: Any) -> None:
        self.event_loop = asyncio.get_running_loop()
        self.engine: Engine = build_engine(load("llama"), **overrides)
        self.death: Exception | None = None
        self.fail_receives = 0
        self._queue: asyncio.Queue[list[FrontEvent] | Exception] = asyncio.Queue()
        self.tokens = TokenSender(self._give_up)
        self.loop = EngineLoop(self.engine, self._emit)

    def __getattr__(self, name: str) -> RemoteMethod:
        return RemoteMethod(self, object.__getattribute__(self, f"_{name}"))

    def _emit(self, events: list[EngineEvent]) -> None:
        outputs = [event for event in events if isinstance(event, TokenOutput)]
        self.tokens.send(outputs)
        told: list[FrontEvent] = [event for event in events if not isinstance(event, TokenOutput)]
        self._tell(told + [Ended(output.request_id) for output in outputs if output.finish_reason is not None])

    def _tell(self, events: list[FrontEvent]) -> None:
        self.event_loop.call_soon_threadsafe(self._queue.put_nowait, events)

    def _give_up(self, request_id: str, reason: str) -> None:
        self.loop.submit(lambda engine: engine.abort(request_id))
        self._tell([Ended(request_id, reason)])

    def die(self) -> None:
        """As if the process had been killed."""
        self.death = ConnectionError("the engine's process is gone")
        self._queue.put_nowait(self.death)

    async def _command(self, command: Callable[[Engine], Any]) -> Any:
        return await asyncio.wrap_future(self.loop.submit(command))

    async def _info(self) -> EngineInfo:
        limits = self.engine.limits
        return EngineInfo("tiny", limits.max_model_len, 512, (), limits.block_size, 1024, limits.num_blocks)

    async def _ping(self) -> None:
        await self._command(lambda engine: None)

    async def _stats(self) -> Any:
        return await self._command(lambda engine: engine.stats())

    async def _add(self, request: GenerateRequest, threshold: int | None, reply_to: ReplyAddress) -> None:
        self.engine.check(request)
        self.tokens.register(request.request_id, reply_to)
        await self._command(lambda engine: engine.add(request, threshold))

    async def _prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> None:
        self.engine.check(request)
        self.tokens.register(request.request_id, reply_to)
        await self._command(lambda engine: engine.prefill(request, first_block))

    async def _prefill_locally(self, request_id: str) -> None:
        await self._command(lambda engine: engine.prefill_locally(request_id))

    async def _abort(self, request_id: str, admission: None) -> None:
        self.tokens.forget(request_id)
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


class Call:
    """What a Serve handle returns: runs by itself, can be awaited, and cancelled."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(coroutine)

    def cancel(self) -> None:
        self._task.cancel()

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()


class Handle:
    """A Serve handle of a deployment with one replica."""

    def __init__(self, replica: Any, method: str = "") -> None:
        self._replica = replica
        self._method = method

    def __getattr__(self, method: str) -> "Handle":
        return Handle(self._replica, method)

    def remote(self, *args: Any) -> Call:
        return Call(getattr(self._replica, self._method)(*args))


class Pools:
    """One ingress, one prefill and one decode replica. Build with `start`."""

    prefill_actor: LocalActor
    decode_actor: LocalActor
    prefill: Prefill
    decode: Decode
    tokens: TokenReceiver
    backend: PoolBackend

    @classmethod
    async def start(
        cls, monkeypatch: Any, min_tokens: int = 16, max_unread_tokens: int = 1000, **overrides: object
    ) -> "Pools":
        pools = cls()
        pools.prefill_actor, pools.decode_actor = LocalActor(**overrides), LocalActor(**overrides)
        actors = iter([pools.prefill_actor, pools.decode_actor])

        async def start(config: Any, resources: Any, build: Any) -> EngineFront:
            return EngineFront(await EngineClient.connect(next(actors)))  # type: ignore[arg-type]

        monkeypatch.setattr(EngineFront, "start", start)
        resources = EngineResources(1, 0, {})
        pools.prefill, pools.decode = Prefill.__new__(Prefill), Decode.__new__(Decode)
        await pools.prefill.__init__(None, resources)  # type: ignore[misc]  # as Serve does with an async constructor
        await pools.decode.__init__(None, resources, Handle(pools.prefill), min_tokens)  # type: ignore[misc]
        pools.tokens = await TokenReceiver.start("127.0.0.1", max_unread_tokens)
        decode: Any = Handle(pools.decode)
        prefill: Any = Handle(pools.prefill)
        admission = Admission(Bounds(max_ttft_s=30.0, max_queued_tokens=10_000, min_remote_tokens=min_tokens))
        pools.backend = PoolBackend(decode, prefill, pools.tokens, admission)
        return pools

    def generate(self, request: GenerateRequest, on_overflow: Callable[[], None] = lambda: None) -> TokenStream:
        """As the API asks for it."""
        return self.backend.generate(request, on_overflow)

    @property
    def actors(self) -> tuple[LocalActor, LocalActor]:
        return self.prefill_actor, self.decode_actor

    async def wait_idle(self) -> None:
        """Return when no engine holds anything; the test's own timeout bounds it."""
        for actor in self.actors:
            # An engine tells nobody that it is idle.
            while not await actor._command(_is_idle):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        await self.tokens.stop()
        for actor in self.actors:
            actor.loop.stop()
            actor.tokens.stop()


def _is_idle(engine: Engine) -> bool:
    engine.check_integrity()
    stats = engine.stats()
    return engine.num_sequences == 0 and stats.num_used_blocks == 0 and stats.num_exported_blocks == 0
