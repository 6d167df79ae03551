"""Ingress and both fronts in one process: real engines on a tiny model, a real token channel, plain calls for Serve."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.decode import Decode
from deployments.engine.engine import Engine
from deployments.engine_client import EngineClient
from deployments.front import EngineFront
from deployments.load.admission import Admission, Bounds
from deployments.load.held import HoldBounds
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.messages import GenerateRequest, TokenOutput
from deployments.pool_backend import PoolBackend
from deployments.prefill import Prefill
from deployments.routing.crossover import Crossover, Goals
from deployments.routing.pools import PoolRouters
from deployments.routing.settings import RoutingSettings
from deployments.telemetry.client_stats import ClientCounts
from deployments.tokens.receiver import TokenReceiver, TokenStream
from tests.deployments.faulty_engine import FaultyEngine
from tests.engine.families import random_prompt
from tests.kv_tier.local_tier import LocalTier
from tests.waiting import PATIENCE_S, until

PROMPT = random_prompt(150, seed=3)
NUM_TOKENS = 12
# So many that a test can look while they are generated.
MANY_TOKENS = 200


@dataclass(frozen=True)
class Replica:
    """One replica of a pool: a `Prefill` or `Decode`, and what it is made of."""

    name: str
    deployment: Any
    front: EngineFront
    engine: FaultyEngine


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
    """A Serve handle: a call goes to the replica that it is meant for, else to the first one not known to be dead."""

    def __init__(self, replicas: list[Replica], method: str = "") -> None:
        self._replicas = replicas
        self._method = method

    def __getattr__(self, method: str) -> "Handle":
        return Handle(self._replicas, method)

    def remote(self, *args: Any) -> Call:
        return Call(self._ask(args) if self._replicas else self._ask_the_first(args))

    async def _ask_the_first(self, args: tuple[Any, ...]) -> Any:
        """As Serve waits for one."""
        await until(lambda: self._replicas)
        return await self._ask(args)

    def _ask(self, args: tuple[Any, ...]) -> Coroutine[Any, Any, Any]:
        alive = [replica for replica in self._replicas if not replica.front.engine.is_dead]
        named_by = PREFILL if self._method == "prefill" else DECODE
        name = getattr(args[0].route, named_by) if args and isinstance(args[0], GenerateRequest) else ""
        named = [replica for replica in alive if replica.name == name]
        coroutine: Coroutine[Any, Any, Any]
        coroutine = getattr((named or alive or self._replicas)[0].deployment, self._method)(*args)
        return coroutine

    def broadcast(self, method: str, *args: Any) -> "Answers":
        alive = [replica for replica in self._replicas if not replica.front.engine.is_dead]
        return Answers([partial(getattr(replica.deployment, method), *args) for replica in alive])


@dataclass(frozen=True)
class Answers:
    """What all replicas say."""

    asks: list[Callable[[], Coroutine[Any, Any, Any]]]

    async def results_async(self, timeout_s: float, *, return_exceptions: bool = False) -> list[Any]:
        async with asyncio.timeout(timeout_s):
            answers = [answer.get_async() for answer in await self._fetch_replica_results_async()]
            return await asyncio.gather(*answers, return_exceptions=return_exceptions)

    async def _fetch_replica_results_async(self) -> "list[Answers]":
        """One for each replica, as `ask_each` takes them."""
        if not self.asks:
            raise DeploymentUnavailableError(DeploymentID("pool"))
        return [Answers([ask]) for ask in self.asks]

    async def get_async(self) -> Any:
        return await self.asks[0]()


@dataclass(frozen=True)
class LocalFront:
    """Brings an engine in this process into being; remembers its front for the test."""

    engine: FaultyEngine
    name: str
    fronts: list[EngineFront]
    max_silence_s: float
    stats_timeout_s: float

    async def start(self) -> EngineFront:
        client = EngineClient(self.engine, await self.engine.info(), on_death=lambda: None)
        self.fronts.append(EngineFront(client, self.max_silence_s, self.name, self.stats_timeout_s))
        return self.fronts[-1]


class Pools:
    """One ingress, and as many prefill and decode replicas as asked for. Build with `start`.

    Attributes:
        prefills: the replicas in the order in which they are asked; a test may change it.
        decodes: likewise.
        engines: those of the prefill replicas, then those of the decode replicas.
        start_ingress: puts another one in the ingress's place, that knows nothing yet.
        start_prefill: adds a prefill replica of a name.
        start_decode: likewise.
    """

    prefills: list[Replica]
    decodes: list[Replica]
    engines: list[FaultyEngine]
    tokens: TokenReceiver
    routers: PoolRouters
    backend: PoolBackend
    start_ingress: Callable[[], None]
    start_prefill: Callable[[str], Coroutine[Any, Any, None]]
    start_decode: Callable[[str], Coroutine[Any, Any, None]]

    @classmethod
    async def start(
        cls,
        *,
        min_tokens: int = 16,
        max_unread_tokens: int = 1000,
        resume_timeout_s: float = PATIENCE_S,
        num_prefill: int = 1,
        num_decode: int = 1,
        max_silence_s: float = PATIENCE_S,
        stats_timeout_s: float = PATIENCE_S,
        routing: RoutingSettings | None = None,
        tiers: Mapping[str, LocalTier] | None = None,
        may_lack_prefill: bool = False,
        hold: HoldBounds | None = None,
        **overrides: object,
    ) -> "Pools":
        pools = cls()

        async def replica(name: str, build: Any, *args: object) -> Replica:
            tier = (tiers or {}).get(PREFILL if build is Prefill else DECODE)
            front = LocalFront(FaultyEngine(tier, **overrides), name, [], max_silence_s, stats_timeout_s)
            deployment = build.__new__(build)
            await deployment.__init__(front, *args)  # as Serve does with an async constructor
            return Replica(name, deployment, front.fronts[0], front.engine)

        async def start_prefill(name: str) -> None:
            pools.prefills.append(await replica(name, Prefill))
            pools.engines.append(pools.prefills[-1].engine)

        pools.start_prefill = start_prefill
        pools.engines, pools.prefills = [], []
        for i in range(num_prefill):
            await start_prefill(f"p{i}")
        prefill_handle: Any = Handle(pools.prefills)
        pools.decodes = []
        least_tokens = None if may_lack_prefill else min_tokens
        decode_handle: Any = Handle(pools.decodes)

        async def start_decode(name: str) -> None:
            pools.decodes.append(
                await replica(name, Decode, prefill_handle, least_tokens, False, lambda: decode_handle)
            )
            pools.engines.append(pools.decodes[-1].engine)

        pools.start_decode = start_decode
        for i in range(num_decode):
            await start_decode(f"d{i}")
        pools.tokens = await TokenReceiver.start("127.0.0.1", max_unread_tokens)
        bounds = Bounds(max_ttft_s=30.0, max_queued_tokens=10_000, min_remote_tokens=min_tokens)
        crossover = Crossover(Goals(ttft_s=2.0, itl_s=0.1), min_tokens, may_lack_prefill)

        def start_ingress() -> None:
            pools.routers = PoolRouters(routing or RoutingSettings(), crossover)
            pools.backend = PoolBackend(
                decode_handle,
                prefill_handle,
                pools.tokens,
                Admission(bounds),
                pools.routers,
                resume_timeout_s,
                ClientCounts(),
                "i0",
                may_lack_prefill=may_lack_prefill,
                hold=hold,
            )

        pools.start_ingress = start_ingress
        pools.start_ingress()
        return pools

    def generate(self, request: GenerateRequest, on_overflow: Callable[[], None] = lambda: None) -> TokenStream:
        """As the API asks for it."""
        stream = self.backend.generate(request, on_overflow)
        assert isinstance(stream, TokenStream), "nobody wants a receipt"
        return stream

    async def collect(self, request: GenerateRequest) -> list[TokenOutput]:
        """All that a client gets."""
        async with aclosing(self.generate(request)) as outputs:
            return [output async for output in outputs]

    async def read(self) -> None:
        """One reading of the pools, as the ingress takes one each second."""
        taken_s = time.monotonic()
        self.backend.take(Reading.of(await self.backend.read_pools(), taken_s))

    @property
    def prefill(self) -> Replica:
        return self.prefills[0]

    @property
    def decode(self) -> Replica:
        return self.decodes[0]

    async def wait_idle(self) -> None:
        """Return when no engine that lives holds anything; the test's own timeout bounds it."""
        for engine in self.engines:
            if engine.death is None:
                await engine.until(_is_idle)

    async def stop(self) -> None:
        """End everything, whatever hangs or is held."""
        for engine in self.engines:
            engine.goes_on.set()
            engine.lets_go.set()
        await self.tokens.stop()
        for engine in self.engines:
            engine.stop()


def tokens_of(outputs: list[TokenOutput]) -> tuple[int, ...]:
    """The tokens of a whole answer: each once, in order, and one end."""
    starts = [0, *accumulate(len(output.token_ids) for output in outputs)]
    assert [output.index for output in outputs] == starts[:-1], "each token comes once, in order"
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return tuple(token for output in outputs for token in output.token_ids)


def is_decoding(engine: Engine) -> bool:
    """It runs one request, some tokens behind its prompt."""
    return engine.stats().num_running == 1 and engine.stats().generated_tokens >= 3


def _is_idle(engine: Engine) -> bool:
    engine.check_integrity()
    stats = engine.stats()
    return engine.num_sequences == 0 and stats.num_used_blocks == 0 and stats.num_exported_blocks == 0
