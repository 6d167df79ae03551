"""What the fronts of both pools share: the engine they own, their health, their numbers."""

from ray import serve

from deployments.engine.config import EngineConfig
from deployments.engine_actor import EngineBuilder, EngineResources, spawn_engine
from deployments.engine_client import EngineClient
from deployments.metrics import HandoffStats, ReplicaStats

_PING_TIMEOUT_S = 10.0


class EngineFront:
    """A replica that owns one engine. Composed into the deployments, not inherited by them."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self.handoff = HandoffStats()

    @classmethod
    async def start(cls, config: EngineConfig, resources: EngineResources, build: EngineBuilder) -> "EngineFront":
        """Spawn the engine in this replica's placement group and wait until it is loaded."""
        return cls(await EngineClient.connect(spawn_engine(config, resources, build)))

    async def stats(self) -> ReplicaStats:
        replica = serve.get_replica_context().replica_id.unique_id
        return ReplicaStats(replica, await self.engine.stats(), self.handoff.copy())

    async def check_health(self) -> None:
        await self.engine.check_health(_PING_TIMEOUT_S)
