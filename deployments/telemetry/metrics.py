"""The page of metrics: all that is known of the pools and of the ingress replicas, in Prometheus' text form."""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest

from deployments.replica_stats import ReplicaStats
from deployments.telemetry.ingress_metrics import IngressCollector
from deployments.telemetry.peers import IngressReading
from deployments.telemetry.pool_metrics import PoolCollector


def render(pools: Mapping[str, Sequence[ReplicaStats]], ingresses: IngressReading) -> bytes:
    """Prometheus' text exposition of one reading.

    Args:
        pools: the replicas of each pool, by its name.
        ingresses: all of them.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PoolCollector(pools))
    registry.register(IngressCollector(ingresses))
    return generate_latest(registry)
