"""What the fronts of both pools share: the engine they own, their health, their numbers."""

import asyncio
import logging
import os
import signal
import time
from functools import partial

from ray import serve

from deployments.engine.config import EngineConfig
from deployments.engine.stats import EngineStats
from deployments.engine_actor import spawn_engine
from deployments.engine_builder import EngineBuilder
from deployments.engine_client import EngineClient
from deployments.engine_info import EngineInfo, EngineResources
from deployments.replica_stats import HandoffStats, ReplicaStats

logger = logging.getLogger(__name__)

_FAREWELL_S = 0.2
# Longer than a step takes; shorter than whoever asks all replicas at once waits for them.
_STATS_TIMEOUT_S = 3.0


class EngineFront:
    """A replica that owns one engine. Composed into the deployments, not inherited by them.

    Args:
        engine: loaded.
        max_silence_s: an engine that takes longer to answer between two steps hangs.
    """

    def __init__(self, engine: EngineClient, max_silence_s: float) -> None:
        self.engine = engine
        self.handoff = HandoffStats()
        self._max_silence_s = max_silence_s
        self._last_stats, self._last_stats_s = EngineStats(), time.monotonic()

    @classmethod
    async def start(cls, config: EngineConfig, resources: EngineResources, build: EngineBuilder) -> "EngineFront":
        """Spawn the engine in this replica's placement group and wait until it is loaded."""
        actor = spawn_engine(config, resources, build)
        info: EngineInfo = await actor.info.remote()
        process = os.pidfd_open(info.pid)  # and not the number, which may become another process's
        return cls(EngineClient(actor, info, partial(_leave, process)), config.max_silence_s)

    async def stats(self) -> ReplicaStats:
        """The numbers of this replica; of an engine that does not answer soon, those that it gave last."""
        asked_s, age_s = time.monotonic(), 0.0
        try:
            self._last_stats = await asyncio.wait_for(self.engine.stats(), _STATS_TIMEOUT_S)
            self._last_stats_s = asked_s
        except TimeoutError:
            age_s = asked_s - self._last_stats_s
        replica = serve.get_replica_context().replica_id.unique_id
        return ReplicaStats(replica, self._last_stats, self.handoff.copy(), age_s)

    async def ready(self) -> None:
        """Return once the engine's loop has turned; costs no step of the model.

        That the model runs, too, is what `check_health` finds out; a replica whose model does not is ended by it.

        Raises:
            TimeoutError or a Ray error: it does not answer.
        """
        await asyncio.wait_for(self.engine.stats(), self._max_silence_s)

    async def check_health(self) -> None:
        """See `EngineClient.check_health`; Ray Serve calls it every few seconds."""
        await self.engine.check_health(self._max_silence_s)


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
