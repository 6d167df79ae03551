"""The process an engine lives in: a Ray actor around `EngineLoop`, one per prefill or decode replica.

It takes messages for the loop, tells its front what happens to its requests, sends their tokens straight to the
ingress, and sends and receives KV chunks. Methods only enqueue or wait, each kind in a concurrency group of its own, so
that a transfer never delays an abort.
"""

import logging
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.engine.config import EngineConfig
from deployments.engine.stats import EngineStats
from deployments.errors import TransferError
from deployments.kv_transfer import direct
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.local import Arena
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
    from deployments.engine.model.load import LoadedModel

logger = logging.getLogger(__name__)

# A chunk that is imported waits for the step in progress; a step longer than this means that the engine hangs.
_IMPORT_TIMEOUT_S = 60.0


def _log_failure(command: "Future[object]") -> None:
    if error := command.exception():
        logger.error("a command failed in the engine", exc_info=error)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a front must know of its engine.

    Attributes:
        path: folder or hub id of the model, tokenizer included.
        max_model_len: tokens of prompt plus output.
        vocab_size: ids are below this.
        eos_token_ids: ids that end a text, as far as the model's configuration says.
        block_size: tokens per KV block.
        bytes_per_block: KV of one block, all layers.
        lease_s: see `EngineConfig`.
        pid: of the engine's process, on its own node.
        num_blocks: KV blocks in the pool.
    """

    path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    bytes_per_block: int
    lease_s: float
    pid: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class EngineResources:
    """What Ray sets aside for an engine's process.

    Attributes:
        num_cpus: logical CPUs.
        num_gpus: GPUs.
        custom: custom resources by name.
    """

    num_cpus: float
    num_gpus: float
    custom: dict[str, float]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what others must know of it.

    Attributes:
        engine: loaded, idle.
        info: for fronts and the ingress.
        layout: of its KV blocks; None: it takes part in no hand-off.
        device_type: where its KV is.
        arena: where it copies KV to that it hands over; None: to memory that is its process's alone.
    """

    engine: "Engine"
    info: EngineInfo
    layout: KVLayout | None
    device_type: str
    arena: Arena | None = None


EngineBuilder: TypeAlias = Callable[[EngineConfig], BuiltEngine]


def build_engine(config: EngineConfig) -> BuiltEngine:
    """Load the model and set up this process for it."""
    # Imported here and not above: fronts name this function, and must not load transformers for it.
    from deployments.engine.model.load import load_model
    from deployments.engine.process import configure_process

    configure_process(config.num_threads or 1)  # never all of the node's cores: it has other engines
    return assemble_engine(load_model(config), config)


def assemble_engine(loaded: "LoadedModel", config: EngineConfig) -> BuiltEngine:
    """An engine around a model, and what its process needs to hand KV over."""
    from deployments.engine.engine import Engine

    engine = Engine(loaded, config)
    limits, shape = engine.limits, engine.kv_shape
    layout = KVLayout(
        model=loaded.fingerprint,
        dtype=str(shape.dtype).removeprefix("torch."),
        block_size=limits.block_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )
    info = EngineInfo(
        path=loaded.path,
        max_model_len=limits.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
        block_size=limits.block_size,
        bytes_per_block=layout.bytes_per_block,
        lease_s=config.lease_s,
        pid=os.getpid(),
        num_blocks=limits.num_blocks,
    )
    logger.info("engine ready: %s, %s, pid %d", loaded.path, limits, os.getpid())
    arena = None
    if config.share_kv and config.hands_over:
        arena = Arena(engine.export_room_bytes, loaded.device.type)
        engine.export_into(arena.allocate)
    return BuiltEngine(engine, info, layout, loaded.device.type, arena)


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
