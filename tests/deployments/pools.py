"""Ingress and both fronts in one process: real engines on a tiny model, a real token channel, plain calls for Ray's."""

import asyncio
import concurrent.futures
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from torch import Tensor

from deployments.decode import Decode
from deployments.engine.engine import Engine
from deployments.engine.loop import EngineLoop
from deployments.engine_client import EngineClient
from deployments.engine_info import EngineInfo, EngineResources
from deployments.front import EngineFront
from deployments.ingress import PoolBackend
from deployments.load.admission import Admission, Bounds
from deployments.messages import ChunkReady, Ended, EngineEvent, FrontEvent, GenerateRequest, ReplyAddress, TokenOutput
from deployments.prefill import Prefill
from deployments.tokens.receiver import TokenReceiver, TokenStream
from deployments.tokens.sender import TokenSender
from tests.engine.driving import build_engine
from tests.engine.families import load

MAX_SILENCE_S = 5.0


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
            await self._actor.goes_on.wait()
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
        result = asyncio.wrap_future(self._future)
        # Whoever is cancelled looks at no failure that comes later.
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        return asyncio.shield(result).__await__()


class LocalActor:
    """An engine behind the interface of `EngineActor`'s handle."""

    def __init__(self, **overrides: Any) -> None:
        self.event_loop = asyncio.get_running_loop()
        self.lease_s = float(overrides.get("lease_s", 15.0))
        self.engine: Engine = build_engine(load("llama"), **overrides)
        self.death: Exception | None = None
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.fail_receives = 0
        self.holds: Callable[[ChunkReady], bool] = lambda chunk: False
        self.has_held = asyncio.Event()
        self.lets_go = asyncio.Event()
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

    def hang(self) -> None:
        """As if the process had been stopped: it answers nothing and tells nothing, until `goes_on` is set."""
        self.goes_on.clear()

    def die(self) -> None:
        """As if the process had been killed."""
        self.death = ConnectionError("the engine's process is gone")
        self._queue.put_nowait(self.death)

    async def _command(self, command: Callable[[Engine], Any]) -> Any:
        return await asyncio.wrap_future(self.loop.submit(command))

    async def _info(self) -> EngineInfo:
        limits = self.engine.limits
        shape = limits.block_size, 1024
        return EngineInfo("tiny", limits.max_model_len, 512, (), *shape, self.lease_s, os.getpid(), limits.num_blocks)

    async def _ping(self) -> None:
        await self._command(lambda engine: engine.run_canary())

    async def _renew(self, request_id: str) -> bool:
        is_held: bool = await self._command(lambda engine: engine.renew(request_id))
        return is_held

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
        if not self.lets_go.is_set() and self.holds(chunk):
            self.has_held.set()
            await self.lets_go.wait()
            if self.death is not None:
                raise self.death
        if self.fail_receives:
            self.fail_receives -= 1
            raise ConnectionError("the transfer broke")
        await self._command(lambda engine: self.loop.emit(engine.import_chunk(chunk, tensor)))

    async def _events(self) -> AsyncGenerator[Any, None]:
        while True:
            events = await self._queue.get()
            await self.goes_on.wait()
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
        self._task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def cancel(self) -> None:
        self._task.cancel()

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()


class Handle:
    """A Serve handle: a call goes to the first replica that is not known to be dead."""

    def __init__(self, replicas: list[Any], method: str = "") -> None:
        self._replicas = replicas
        self._method = method

    def __getattr__(self, method: str) -> "Handle":
        return Handle(self._replicas, method)

    def remote(self, *args: Any) -> Call:
        alive = [replica for replica in self._replicas if replica._front.engine._death is None]
        return Call(getattr((alive or self._replicas)[0], self._method)(*args))


class Pools:
    """One ingress, and as many prefill and decode replicas as asked for. Build with `start`."""

    actors: list[LocalActor]
    prefills: list[Prefill]
    decodes: list[Decode]
    tokens: TokenReceiver
    backend: PoolBackend

    @classmethod
    async def start(
        cls,
        monkeypatch: Any,
        min_tokens: int = 16,
        max_unread_tokens: int = 1000,
        resume_timeout_s: float = 10.0,
        num_prefill: int = 1,
        num_decode: int = 1,
        **overrides: object,
    ) -> "Pools":
        pools = cls()
        pools.actors = [LocalActor(**overrides) for _ in range(num_prefill + num_decode)]
        actors = iter(pools.actors)

        async def start(config: Any, resources: Any, build: Any) -> EngineFront:
            actor: Any = next(actors)
            return EngineFront(EngineClient(actor, await actor.info.remote(), on_death=lambda: None), MAX_SILENCE_S)

        monkeypatch.setattr(EngineFront, "start", start)
        resources = EngineResources(1, 0, {})
        pools.prefills = [Prefill.__new__(Prefill) for _ in range(num_prefill)]
        for prefill in pools.prefills:
            await prefill.__init__(None, resources)  # type: ignore[misc]  # as Serve does with an async constructor
        prefill_handle: Any = Handle(pools.prefills)
        pools.decodes = [Decode.__new__(Decode) for _ in range(num_decode)]
        for decode in pools.decodes:
            await decode.__init__(None, resources, prefill_handle, min_tokens, False)  # type: ignore[misc]
        decode_handle: Any = Handle(pools.decodes)
        pools.tokens = await TokenReceiver.start("127.0.0.1", max_unread_tokens)
        admission = Admission(Bounds(max_ttft_s=30.0, max_queued_tokens=10_000, min_remote_tokens=min_tokens))
        pools.backend = PoolBackend(decode_handle, prefill_handle, pools.tokens, admission, resume_timeout_s)
        return pools

    def generate(self, request: GenerateRequest, on_overflow: Callable[[], None] = lambda: None) -> TokenStream:
        """As the API asks for it."""
        return self.backend.generate(request, on_overflow)

    @property
    def prefill(self) -> Prefill:
        return self.prefills[0]

    @property
    def decode(self) -> Decode:
        return self.decodes[0]

    @property
    def prefill_actor(self) -> LocalActor:
        return self.actors[0]

    @property
    def decode_actor(self) -> LocalActor:
        return self.actors[len(self.prefills)]

    async def wait_idle(self) -> None:
        """Return when no engine that lives holds anything; the test's own timeout bounds it."""
        for actor in self.actors:
            if actor.death is not None:
                continue
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
