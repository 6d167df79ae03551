"""What the fronts of both pools share: the engine they own, their health, their numbers."""

import asyncio
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from prometheus_client.core import Metric
from ray import serve

from deployments.engine.config import EngineConfig
from deployments.engine.stats import EngineStats
from deployments.engine_builder import EngineBuilder, build_engine
from deployments.engine_client import EngineClient
from deployments.engine_info import EngineResources
from deployments.kv_tier.settings import TierSettings
from deployments.load.reading import DECODE, PREFILL
from deployments.planner.wire import to_numbers
from deployments.ray_errors import keep_refusals_out_of_logs
from deployments.replica_stats import HandoffStats, Positions, ReplicaStats
from deployments.telemetry.metrics import families_of_replica
from deployments.telemetry.ray_metrics import tell_ray
from deployments.telemetry.settings import MetricsPlan

logger = logging.getLogger(__name__)

_FAREWELL_S = 0.2
# Longer than a step takes; shorter than whoever asks all replicas at once waits for them.
_STATS_TIMEOUT_S = 3.0


class EngineFront:
    """A replica's engine, and what the replica knows of it. Composed into the deployments, not inherited by them.

    Args:
        engine: loaded.
        max_silence_s: an engine that takes longer to answer between two steps hangs.
        replica: name of the replica.
        stats_timeout_s: an engine that takes longer to tell its numbers is taken to have those that it told last.
        tells_planner: see `SpawnedEngine`.
    """

    def __init__(
        self,
        engine: EngineClient,
        max_silence_s: float,
        replica: str,
        stats_timeout_s: float = _STATS_TIMEOUT_S,
        *,
        tells_planner: bool = False,
    ) -> None:
        self.engine = engine
        self.handoff = HandoffStats()
        self.prompts: Counter[str] = Counter()
        self._max_silence_s = max_silence_s
        self.replica = replica
        self.tells_planner = tells_planner
        self._stats_timeout_s = stats_timeout_s
        self._last_stats, self._last_stats_s = EngineStats(), time.monotonic()

    async def stats(self, read: Positions | None = None) -> ReplicaStats:
        """The numbers of this replica; of an engine that does not answer soon, those that it gave last.

        Args:
            read: what the caller knows of the replicas' prefix caches, to be told what changed since; None: it does not
                want to know.
        """
        asked_s, age_s, cache = time.monotonic(), 0.0, None
        try:
            async with asyncio.timeout(self._stats_timeout_s):
                if read is None:
                    self._last_stats = await self.engine.handle.stats()
                else:
                    self._last_stats, cache = await self.engine.handle.report(read.get(self.replica))
            self._last_stats_s = asked_s
        except TimeoutError:
            age_s = asked_s - self._last_stats_s
        handoff, prompts = self.handoff.copy(), self.prompts.copy()
        return ReplicaStats(self.replica, self._last_stats, handoff, age_s, cache, prompts)

    def tell_ray(self, pool: str, vllm_model: str | None) -> None:
        """Tell Ray's agent the metrics of this replica, from now on; see `families_of_replica`."""

        async def read() -> Iterable[Metric]:
            return families_of_replica(pool, await self.stats(), vllm_model)

        self._telling_ray = asyncio.create_task(tell_ray(read))

    async def ready(self) -> None:
        """Return once the engine's loop has turned; costs no step of the model.

        That the model runs, too, is what `check_health` finds out; a replica whose model does not is ended by it.

        Raises:
            TimeoutError or a Ray error: it does not answer.
        """
        async with asyncio.timeout(self._max_silence_s):
            await self.engine.handle.stats()

    async def check_health(self) -> None:
        """See `EngineClient.check_health`; Ray Serve calls it every few seconds."""
        await self.engine.check_health(self._max_silence_s)


class FrontSource(Protocol):
    """Brings an engine into being for the replica that asks."""

    async def start(self) -> EngineFront:
        """Return when the engine is loaded."""
        ...


@dataclass(frozen=True, slots=True)
class SpawnedEngine:
    """An engine in an actor of its own, in the placement group of the replica that starts it.

    Attributes:
        config: of the engine.
        resources: set aside for it.
        build: makes it.
        tier: that it shares KV through; None: none.
        tells_planner: Ray Serve carries the engine's numbers to its controller, for the planner.
        metrics: of the replica.
        may_flip: the planner may tell the engine to compute prompts for others.
    """

    config: EngineConfig
    resources: EngineResources
    build: EngineBuilder = build_engine
    tier: TierSettings | None = None
    tells_planner: bool = False
    metrics: MetricsPlan = field(default_factory=MetricsPlan)
    may_flip: bool = False

    async def start(self) -> EngineFront:
        # Not above: whoever binds the application would load torch with it.
        from deployments.engine_actor import spawn_engine

        keep_refusals_out_of_logs()
        replica = serve.get_replica_context().replica_id.unique_id
        engine = spawn_engine(
            self.config, self.resources, self.build, self.tier, name=replica if self.may_flip else None
        )
        info = await engine.info()
        process = os.pidfd_open(info.pid)  # and not the number, which may become another process's
        client = EngineClient(engine, info, partial(_leave, process))
        front = EngineFront(client, self.config.max_silence_s, replica, tells_planner=self.tells_planner)
        if self.metrics.to_ray:
            front.tell_ray(PREFILL if self.config.hands_over and not self.may_flip else DECODE, self.metrics.vllm_model)
        return front


class EngineReplica:
    """What a replica of either pool is asked as the owner of an engine; the ingress and Serve call these by name."""

    _front: EngineFront

    async def stats(self, read: Positions | None = None) -> ReplicaStats:
        """See `EngineFront.stats`."""
        return await self._front.stats(read)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve carries to its controller for the planner; nothing if that does not decide."""
        return to_numbers((await self._front.stats()).engine) if self._front.tells_planner else {}

    async def ready(self) -> None:
        """See `EngineFront.ready`."""
        await self._front.ready()

    async def check_health(self) -> None:
        """See `EngineFront.check_health`."""
        await self._front.check_health()


def _leave(engine_process: int) -> None:
    """End the engine's process, which may hang, and this one: a replica without its engine can do nothing.

    Serve learns of it at once, sends no more requests here, and starts another. A replica that waited for three failed
    health checks would, having the shortest queue, be given the requests that fled from it.
    """
    try:
        signal.pidfd_send_signal(engine_process, signal.SIGKILL)
    except ProcessLookupError:
        logger.info("the engine's process was gone")
    # Not at once: readers that were told of the death answer their callers first.
    asyncio.get_running_loop().call_later(_FAREWELL_S, os._exit, 1)
