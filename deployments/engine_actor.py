"""The process an engine lives in: a Ray actor around `EngineLoop`, one per prefill or decode replica.

It takes messages for the loop, tells its front what happens to its requests, sends their tokens straight to the
ingress, and sends and receives KV chunks. Methods only enqueue or wait, each kind in a concurrency group of its own, so
that a transfer never delays an abort.
"""

import logging
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.engine.config import EngineConfig
from deployments.engine.stats import EngineStats
from deployments.engine_builder import EngineBuilder, build_engine
from deployments.engine_info import EngineInfo, EngineResources
from deployments.errors import TransferError
from deployments.kv_transfer import direct
from deployments.messages import (
    ChunkReady,
    Ended,
    EngineEvent,
    FrontEvent,
    GenerateRequest,
    ReplyAddress,
    TokenOutput,
)
from deployments.tokens.sender import TokenSender

if TYPE_CHECKING:
    import torch
    from ray.actor import ActorHandle
    from torch import Tensor

    from deployments.engine.engine import Engine

logger = logging.getLogger(__name__)

# A chunk that is imported waits for the step in progress; a step longer than this means that the engine hangs.
_IMPORT_TIMEOUT_S = 60.0


def _log_failure(command: "Future[object]") -> None:
    if error := command.exception():
        logger.error("a command failed in the engine", exc_info=error)


class EngineActor:
    """See the module.

    Args:
        config: of the engine.
        build: makes it; benchmarks pass an engine without a model.
    """

    def __init__(self, config: EngineConfig, build: EngineBuilder = build_engine) -> None:
        from deployments.engine.loop import EngineLoop

        built = build(config)
        self._engine = built.engine
        self._info = built.info
        if built.layout is not None:
            direct.configure(built.layout, built.device_type, arena=built.arena)
        self._events: queue.SimpleQueue[list[FrontEvent]] = queue.SimpleQueue()
        self._tokens = TokenSender(self._give_up)
        self._loop = EngineLoop(self._engine, self._emit)

    @ray.method(concurrency_group="ctl")
    def info(self) -> EngineInfo:
        return self._info

    @ray.method(concurrency_group="ctl")
    def ping(self) -> None:
        """Return once the loop has turned and the model has run a token; raises what is wrong with either."""
        self._loop.call(lambda engine: engine.run_canary())

    @ray.method(concurrency_group="ctl")
    def stats(self) -> EngineStats:
        stats = self._loop.call(lambda engine: engine.stats())
        stats.num_receivers = self._tokens.num_channels
        return stats

    @ray.method(concurrency_group="ctl")
    def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> None:
        """Queue a request to decode here; see `Engine.add`. Its tokens go to `reply_to`."""
        self._engine.check(request)
        self._tokens.register(request.request_id, reply_to)
        self._post(lambda engine: engine.add(request, remote_threshold))

    @ray.method(concurrency_group="ctl")
    def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> None:
        """Queue a prompt to compute for another engine; see `Engine.prefill`. Its first token goes to `reply_to`."""
        self._engine.check(request)
        self._tokens.register(request.request_id, reply_to)
        self._post(lambda engine: engine.prefill(request, first_block))

    @ray.method(concurrency_group="ctl")
    def prefill_locally(self, request_id: str) -> None:
        self._post(lambda engine: engine.prefill_locally(request_id))

    @ray.method(concurrency_group="ctl")
    def renew(self, request_id: str) -> bool:
        """See `Engine.renew`; an engine whose loop hangs does not answer."""
        return self._loop.call(lambda engine: engine.renew(request_id))

    @ray.method(concurrency_group="ctl")
    def abort(self, request_id: str, admission: None) -> None:
        """End a request; `admission` is what its `add` or `prefill` returned, so that it cannot come later."""
        self._tokens.forget(request_id)
        self._post(lambda engine: engine.abort(request_id))

    @ray.method(concurrency_group="ctl")
    def release_chunk(self, request_id: str, index: int) -> None:
        self._post(lambda engine: engine.release_chunk(request_id, index))

    @direct.exports_kv
    def take_chunk(self, request_id: str, index: int) -> "Tensor":
        """The KV of a chunk; it leaves this process by direct transfer only.

        Raises:
            TransferError: the chunk is gone, since the request was aborted.
        """
        chunk = self._engine.take_chunk(request_id, index)
        if chunk is None:
            raise TransferError(f"{request_id}: chunk {index} is gone")
        return chunk

    @direct.receives_kv
    def receive_kv(self, chunk: ChunkReady, tensor: "Tensor") -> None:
        """Take a chunk into the pool; returns when it is there and the chunk is read no more."""
        imported = self._loop.call(partial(self._import, chunk, tensor), _IMPORT_TIMEOUT_S)
        if imported is not None:
            imported.synchronize()

    def _import(self, chunk: ChunkReady, tensor: "Tensor", engine: "Engine") -> "torch.cuda.Event | None":
        self._loop.emit(engine.import_chunk(chunk, tensor))
        return engine.fence()

    @ray.method(concurrency_group="stream")
    def events(self) -> Iterator[list[FrontEvent]]:
        """What happens to the requests, one item per step or several steps at once; for one reader."""
        while True:
            batch = self._events.get()
            while not self._events.empty():
                batch = batch + self._events.get()
            yield batch

    def _emit(self, events: list[EngineEvent]) -> None:
        """Share out what a step made; called in the loop's thread."""
        outputs = [event for event in events if isinstance(event, TokenOutput)]
        if outputs:
            self._tokens.send(outputs)
        told: list[FrontEvent] = [event for event in events if not isinstance(event, TokenOutput)]
        told += [Ended(output.request_id) for output in outputs if output.finish_reason is not None]
        if told:
            self._events.put(told)

    def _give_up(self, request_id: str, reason: str) -> None:
        """End a request whose tokens nobody takes; called in the sender's thread."""
        self._post(lambda engine: engine.abort(request_id))
        self._events.put([Ended(request_id, reason)])

    def _post(self, command: "Callable[[Engine], object]") -> None:
        """Have the loop carry out a command whose result nobody waits for; a failure is at least logged."""
        self._loop.submit(command).add_done_callback(_log_failure)


def spawn_engine(
    config: EngineConfig, resources: EngineResources, build: EngineBuilder = build_engine
) -> "ActorHandle[Any]":
    """Start an engine in the second bundle of the calling replica's placement group; it dies with the replica."""
    group = ray.util.get_current_placement_group()
    assert group is not None, "a front runs in a placement group of two bundles: itself and its engine"
    actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(EngineActor)
    engine: ActorHandle[Any] = actor_class.options(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        resources=resources.custom,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1),
    ).remote(config, build)
    return engine
