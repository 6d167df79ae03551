"""The two applications that are compared: ours, and the ordinary way to stream tokens through Ray Serve."""

import queue
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import serve
from starlette.applications import Starlette

from app.config import AppConfig
from app.graph import ingress_settings
from deployments.api.http import build_app
from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer
from deployments.decode import Decode
from deployments.engine.config import EngineConfig
from deployments.engine.loop import EngineLoop
from deployments.engine_info import EngineResources
from deployments.front import SpawnedEngine
from deployments.ingress import Ingress
from deployments.load.admission import Admission, Bounds, Ticket
from deployments.messages import EngineEvent, GenerateRequest, ModelInfo, TokenOutput
from deployments.telemetry.client_stats import ClientCounts
from tests.bench.serving.paced import build_paced


def ours(args: AppConfig) -> serve.Application:
    """`app:graph` with `mode=colocated`, but for the engine's builder."""
    resources = EngineResources(args.decode.num_cpus, 0, {})
    engine = SpawnedEngine(args.engine_config("decode"), resources, build_paced, metrics=args.metrics_plan())
    decode = serve.deployment(**args.deployment_options("decode"))(Decode).bind(engine, None, 0, False)
    ingress = serve.deployment(**args.deployment_options("ingress"))(Ingress)
    return ingress.bind(decode, None, ingress_settings(args))


class OrdinaryEngineActor:
    """The engine's process, with one stream of events to its front."""

    def __init__(self, config: EngineConfig) -> None:
        self._events: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
        self._built = build_paced(config)
        self._loop = EngineLoop(self._built.engine, self._events.put)

    @ray.method(concurrency_group="ctl")
    def info(self) -> Any:
        return self._built.info

    @ray.method(concurrency_group="ctl")
    def add(self, request: GenerateRequest) -> None:
        self._loop.submit(lambda engine: engine.add(request))

    @ray.method(concurrency_group="ctl")
    def abort(self, request_id: str) -> None:
        self._loop.submit(lambda engine: engine.abort(request_id))

    @ray.method(concurrency_group="stream")
    def events(self) -> Iterator[list[EngineEvent]]:
        while True:
            yield self._events.get()


class OrdinaryDecode:
    """The front: sorts the engine's events by request and yields them, one handle stream per request."""

    async def __init__(self, config: EngineConfig, num_cpus: float) -> None:  # type: ignore[misc]
        import asyncio

        options: dict[str, Any] = {"num_cpus": num_cpus, "concurrency_groups": {"ctl": 4, "stream": 1}}
        actor: Any = ray.remote(**options)(OrdinaryEngineActor)
        self._engine = actor.remote(config)
        self._info = await self._engine.info.remote()
        self._queues: dict[str, asyncio.Queue[TokenOutput]] = {}
        self._new_queue: Callable[[], asyncio.Queue[TokenOutput]] = asyncio.Queue
        self._pump = asyncio.create_task(self._distribute())

    async def _distribute(self) -> None:
        async for ref in self._engine.events.options(num_returns="streaming").remote():
            for event in await ref:
                if isinstance(event, TokenOutput) and event.request_id in self._queues:
                    self._queues[event.request_id].put_nowait(event)

    async def engine_info(self) -> Any:
        return self._info

    async def ready(self) -> None: ...

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        events = self._queues[request.request_id] = self._new_queue()
        try:
            await self._engine.add.remote(request)
            while True:
                output = await events.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            del self._queues[request.request_id]
            self._engine.abort.remote(request.request_id)


class OrdinaryBackend:
    """One handle stream per request."""

    def __init__(self, decode: Any) -> None:
        self._decode = decode

    async def admit(self, requests: Sequence[GenerateRequest], key: bytes) -> Ticket:
        return Admission(Bounds(1.0, 2**30, None)).admit([1], requests[0].priority, key)  # everybody

    async def generate(
        self,
        request: GenerateRequest,
        on_overflow: Callable[[], None],
        on_receipt: Any = None,
        *,
        holds_last: bool = True,
    ) -> AsyncGenerator[TokenOutput, None]:
        async for output in self._decode.options(stream=True).generate.remote(request):
            yield output

    async def health(self) -> tuple[bool, str]:
        await self._decode.ready.remote()
        return True, "ok"

    async def metrics(self) -> bytes:
        return b""

    async def live(self) -> Mapping[str, object]:
        return {}


@serve.ingress()
class OrdinaryIngress:
    """The same API and the same text as ours."""

    async def __init__(self, decode: Any, served_model_name: str) -> None:  # type: ignore[misc]
        info = await decode.engine_info.remote()
        self._info = ModelInfo(served_model_name, info.path, info.max_model_len, info.vocab_size, ())
        self._codec = TextCodec(read_tokenizer(info.path))
        self._backend = OrdinaryBackend(decode)

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(self._backend, self._codec, self._info, observer=ClientCounts())


def ordinary(args: AppConfig) -> serve.Application:
    """Ingress, decode front, engine actor; tokens as Ray Serve's documentation streams them."""
    options = args.deployment_options("decode")
    for name in ("placement_group_bundles", "placement_group_strategy"):
        del options[name]
    decode = serve.deployment(**options)(OrdinaryDecode).bind(args.engine_config("decode"), args.decode.num_cpus)
    ingress = serve.deployment(**args.deployment_options("ingress"))(OrdinaryIngress)
    return ingress.bind(decode, args.served_model_name)
