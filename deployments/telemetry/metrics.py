"""All that is known of pools and ingress replicas as metrics: the page that Prometheus reads, or a part of it."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from deployments.replica_stats import ReplicaStats
from deployments.telemetry.ingress_metrics import AnswersCollector, IngressCollector
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.peers import IngressReading
from deployments.telemetry.pool_metrics import PoolCollector
from deployments.telemetry.vllm_metrics import VllmCollector

Pools = Mapping[str, Sequence[ReplicaStats]]


def render(pools: Pools, ingresses: IngressReading, vllm_model: str | None = None) -> bytes:
    """Prometheus' text exposition of one reading.

    Args:
        pools: the replicas of each pool, by its name.
        ingresses: all of them.
        vllm_model: the model's name, where vLLM's names of metrics are wanted, too.
    """
    registry = CollectorRegistry()
    registry.register(PoolCollector(pools))
    registry.register(IngressCollector(ingresses.replicas))
    registry.register(AnswersCollector(ingresses))
    if vllm_model is not None:
        registry.register(VllmCollector(vllm_model, pools, ingresses.replicas))
    return generate_latest(registry)


def families_of_replica(pool: str, replica: ReplicaStats, vllm_model: str | None) -> Iterator[Metric]:
    """What one replica of a pool has to tell."""
    pools = {pool: [replica]}
    yield from PoolCollector(pools).collect()
    if vllm_model is not None:
        yield from VllmCollector(vllm_model, pools, []).collect()


def families_of_ingress(ingress: IngressStats, vllm_model: str | None) -> Iterator[Metric]:
    """What one ingress replica has to tell of itself."""
    collectors: list[Collector] = [IngressCollector([ingress])]
    if vllm_model is not None:
        collectors.append(VllmCollector(vllm_model, {}, [ingress]))
    for collector in collectors:
        yield from collector.collect()
