"""A pool without engines, and what sends prompts to it: what a replica has cached is what it was sent."""

import os
import time
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.engine.scheduling.cache_log import CacheLog, Position
from deployments.engine.stats import EngineStats
from deployments.messages import GenerateRequest, SamplingParams
from deployments.routing.hashes import PromptHashes
from deployments.routing.registry import register
from deployments.routing.router import Report, Router, RoutingSettings

BLOCK_SIZE = 16


class FakePool:
    """One replica."""

    def __init__(self) -> None:
        self._log = CacheLog()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def prefill(self, request: GenerateRequest) -> str:
        for block in PromptHashes(request.prompt_token_ids).of(BLOCK_SIZE):
            if block not in self._log.held:
                self._log.published(block)
        return self._name

    async def report(self, read: dict[str, Position | None]) -> tuple[str, Report]:
        stats = EngineStats(num_blocks=1000, max_num_seqs=8, max_num_batched_tokens=512)
        return self._name, Report(stats, BLOCK_SIZE, self._log.since(read.get(self._name)))

    async def die(self) -> None:
        os._exit(1)


class Sender:
    """Has a handle of the pool and a router."""

    def __init__(self, pool: "DeploymentHandle[Any]") -> None:
        self._pool = pool
        self._router = Router.for_prefill(RoutingSettings())
        register("FakePool", self._router)

    async def read(self) -> list[str]:
        """Have the replicas report; their names."""
        as_of_s = time.monotonic()
        reports = await self._pool.broadcast("report", self._router.positions()).results_async(timeout_s=30)
        self._router.update(dict(reports), as_of_s, time.monotonic())
        return sorted(self._router.replicas)

    async def send(self, token: int, times: int) -> list[str]:
        """Send a prompt of that token; who took it, each time."""
        request = GenerateRequest("r", (token,) * 800, SamplingParams(max_tokens=1))
        return [await self._pool.prefill.remote(request) for _ in range(times)]

    async def kill_one(self) -> str:
        try:
            await self._pool.die.remote()
        except Exception as error:
            return type(error).__name__
        return ""

    async def replicas(self) -> list[str]:
        return sorted(self._router.replicas)
