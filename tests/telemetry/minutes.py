"""A service whose minutes pass as a test says."""

from collections import Counter
from collections.abc import Callable

from deployments.engine.stats import EngineStats
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.replica_stats import HandoffStats, ReplicaStats
from deployments.telemetry.client_stats import ClientCounts
from deployments.telemetry.history import History
from deployments.telemetry.ingress_stats import IngressStats


class Service:
    """One ingress, and engines that do what a test says; each second it reads them, but for the pools in `unread`."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0  # where a slot begins
        self.clients = ClientCounts()
        self.refusals: Counter[tuple[str, str]] = Counter()
        self.engines: dict[str, dict[str, EngineStats]] = {PREFILL: {}, DECODE: {}}
        self.silent_s: dict[str, float] = {}
        self.unread: set[str] = set()
        self.history = History(self._count, lambda: self.now_s)

    def _count(self) -> IngressStats:
        return IngressStats("i", self.clients.stats.copy(), self.refusals.copy())

    def start(self, pool: str, name: str, generated_tokens: int = 0) -> EngineStats:
        engine = EngineStats(num_blocks=10, max_num_seqs=4, generated_tokens=generated_tokens)
        self.engines[pool][name] = engine
        return engine

    def run(self, seconds: float, each_second: Callable[[], None] = lambda: None) -> None:
        for _ in range(int(seconds)):
            self.now_s += 1.0
            each_second()
            pools = {
                pool: [
                    ReplicaStats(name, engine.copy(), HandoffStats(), self.silent_s.get(name, 0.0))
                    for name, engine in engines.items()
                ]
                for pool, engines in self.engines.items()
                if pool not in self.unread
            }
            self.history.take(Reading.of(pools, self.now_s))
