"""Hands metrics on to Ray's own agent, so that a cluster's Prometheus, which reads all agents, needs no other target.

Each replica tells of itself. Ray puts `ray_` before the names and its own labels beside ours. A histogram goes as the
series that Prometheus makes of it: Ray's own takes one observation at a time, and ours has counted thousands.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from ray.util.metrics import Counter, Gauge

logger = logging.getLogger(__name__)

# As often as Ray's workers tell their agent.
PERIOD_S = 10.0


class RayMetrics:
    """Metrics of one replica, as Ray has them."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}

    def tell(self, families: Iterable[Metric]) -> None:
        """What is known now."""
        for family in families:
            for sample in family.samples:
                name = sample.name.replace(":", "_")  # as Ray has vLLM's
                if family.type == "counter":
                    self._count(name, family.documentation, sample)
                else:
                    self._set(name, family.documentation, sample)

    def _set(self, name: str, text: str, sample: Sample) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, text, tuple(sample.labels))
        gauge.set(sample.value, sample.labels)

    def _count(self, name: str, text: str, sample: Sample) -> None:
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = Counter(name, text, tuple(sample.labels))
        key = (name, tuple(sample.labels.values()))
        before = self._told.get(key)
        if before is None:
            # What begins with its first event has no increase by it. `inc` refuses 0, what is below it does not (2.60).
            counter._record(before := 0.0, sample.labels)
        if sample.value > before:
            counter.inc(sample.value - before, sample.labels)
        self._told[key] = sample.value


async def tell_ray(read: Callable[[], Awaitable[Iterable[Metric]]], period_s: float = PERIOD_S) -> None:
    """Tell Ray's agent, again and again, until cancelled.

    Args:
        read: what is known now.
        period_s: between two readings.
    """
    metrics = RayMetrics()
    is_failing = False
    while True:
        try:
            metrics.tell(await read())
            is_failing = False
        except Exception as error:
            if not is_failing:  # once, and not every period
                logger.warning("Ray's agent is told no metrics: %r", error)
            is_failing = True
        await asyncio.sleep(period_s)
