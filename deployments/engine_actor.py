"""The process an engine lives in: a Ray actor around `EngineHost`, one per prefill or decode replica.

Fits what a front may ask (`EngineHandle`) into Ray: each kind of question in a concurrency group of its own, so that a
transfer never delays an abort, and KV by direct transport.
"""

import gc
import queue
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.engine.config import EngineConfig
from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats
from deployments.engine_builder import BuiltEngine, EngineBuilder, build_engine
from deployments.engine_handle import RayEngine
from deployments.engine_info import EngineInfo, EngineResources
from deployments.kv_tier.keys import TierKeys
from deployments.kv_tier.ray_store import RayStore
from deployments.kv_tier.settings import TierSettings
from deployments.kv_transfer import direct
from deployments.kv_transfer.base import Arrivals
from deployments.messages import FrontEvent, GenerateRequest, ReplyAddress
from deployments.receipts import ChunkArrived
from deployments.roles import NAMESPACE

if TYPE_CHECKING:
    import numpy as np

    from deployments.engine.handoff.outbox import TakenHandoff
    from deployments.engine_host import EngineHost
    from deployments.kv_tier.index import Origins

# Of requests that are over here while their prefill engine has not said so yet.
_MAX_STALE_HANDOFFS = 32


class EngineActor:
    """See the module; what its methods do is said at `EngineHandle`.

    Args:
        config: of the engine.
        build: makes it; benchmarks pass an engine without a model.
        tier: that it gives KV to and takes it from; None: none.
    """

    def __init__(
        self, config: EngineConfig, build: EngineBuilder = build_engine, tier: TierSettings | None = None
    ) -> None:
        built = build(config)
        if built.layout is not None:
            direct.configure(built.layout, built.device_type, arena=built.arena)
        self._events: queue.SimpleQueue[list[FrontEvent]] = queue.SimpleQueue()
        self._host = self.build_host(built)
        if tier is not None and tier.is_on and built.layout is not None and config.enable_prefix_caching:
            keys = TierKeys(built.layout, tier.object_bytes)
            tier.check_object(keys.num_bytes)
            self._host.use_tier(RayStore(tier), keys, tier.copy_share_on(built.device_type))
        # What is loaded by now stays. To look through it for garbage takes 0.24 s (495,000 objects, one core of a Xeon,
        # 2026-11-30), in which no step is launched and no token told.
        gc.collect()
        gc.freeze()

    def build_host(self, built: BuiltEngine) -> "EngineHost":
        """What does the work; a benchmark has one that looks closer."""
        # Not above: the front imports this module to start the actor, and must not load the engine.
        from deployments.engine_host import EngineHost

        return EngineHost(built, self._events.put)

    @ray.method(concurrency_group="ctl")
    def info(self) -> EngineInfo:
        return self._host.info

    @ray.method(concurrency_group="ctl")
    def ping(self) -> None:
        self._host.ping()

    @ray.method(concurrency_group="ctl")
    def stats(self) -> EngineStats:
        return self._host.stats()

    @ray.method(concurrency_group="ctl")
    def report(self, read: Position | None) -> tuple[EngineStats, CacheEvents]:
        return self._host.report(read)

    @ray.method(concurrency_group="ctl")
    def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> None:
        self._host.add(request, remote_threshold, reply_to)

    @ray.method(concurrency_group="ctl")
    def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> None:
        self._host.prefill(request, first_block, reply_to)

    @ray.method(concurrency_group="ctl")
    def prefill_locally(self, request_id: str) -> None:
        self._host.prefill_locally(request_id)

    @ray.method(concurrency_group="ctl")
    def renew(self, request_id: str) -> bool:
        return self._host.renew(request_id)

    @ray.method(concurrency_group="ctl")
    def abort(self, request_id: str, admission: None) -> None:
        self._host.abort(request_id)

    @ray.method(concurrency_group="ctl")
    def take_role(self, is_flipped: bool) -> None:
        """See `EngineHost.take_role`; called by its name, from Serve's controller (`roles.py`)."""
        self._host.take_role(is_flipped)

    @direct.exports_kv
    def take_handoff(self, request_id: str) -> "TakenHandoff":
        """It leaves this process by direct transfer only."""
        return self._host.take_handoff(request_id)

    @direct.receives_kv
    def receive_kv(self, request_id: str, arrivals: Arrivals) -> list[ChunkArrived]:
        with self._host.filling(arrivals.release) as filling:
            for arrival in arrivals:
                filling.add(
                    replace(arrival.chunk, request_id=request_id),
                    arrival.tensor,
                    arrival.complete_s,
                    num_parts=arrival.num_parts,
                    keeps=arrival.is_lent or arrival.chunk.layers is None,
                )
                # Else this name would keep the part until the next one comes.
                del arrival
            return filling.finish()

    @ray.method(concurrency_group=direct.TIER_GROUP)
    def give(self, key: bytes) -> "tuple[Origins | None, np.ndarray | None]":
        """KV for the tier, and for which requests it was computed; nothing if it is gone. Two results to Ray."""
        return self._host.give(key) or (None, None)

    @ray.method(concurrency_group="stream")
    def events(self) -> Iterator[list[FrontEvent]]:
        """One item per step, or several steps at once."""
        while True:
            batch = self._events.get()
            while not self._events.empty():
                batch = batch + self._events.get()
            yield batch


def spawn_engine(
    config: EngineConfig,
    resources: EngineResources,
    build: EngineBuilder = build_engine,
    tier: TierSettings | None = None,
    name: str | None = None,
) -> RayEngine:
    """Start an engine in the second bundle of the calling replica's placement group; it dies with the replica.

    Args:
        config: of the engine.
        resources: set aside for it.
        build: makes it.
        tier: see `EngineActor`.
        name: by which others find its actor, see `roles.py`; None: they need not.
    """
    group = ray.util.get_current_placement_group()
    assert group is not None, "a front runs in a placement group of two bundles: itself and its engine"
    actor_class: Any = ray.remote(**direct.engine_actor_options(config.max_num_seqs + _MAX_STALE_HANDOFFS))(EngineActor)
    actor = actor_class.options(
        name=name,
        namespace=NAMESPACE,
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        resources=resources.custom,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=1),
    ).remote(config, build, tier)
    return RayEngine(actor)
