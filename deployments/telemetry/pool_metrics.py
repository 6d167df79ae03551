"""Numbers of both pools' replicas in Prometheus' text form, as their engines and fronts tell them.

Knows what each number is called; the engines and fronts keep the numbers themselves.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.engine.stats import Histogram
from deployments.replica_stats import ReplicaStats
from deployments.telemetry.client_metrics import ClientMetrics
from deployments.telemetry.families import PREFIX, cumulative

_LABELS = ("pool", "replica")

_GAUGES = {
    "queued_prompt_tokens": ("num_queued_prompt_tokens", "Prompt tokens that wait to be computed."),
    "waiting_sequences": ("num_waiting", "Sequences without KV blocks."),
    "reserved_sequences": ("num_reserved", "Sequences whose KV is on its way."),
    "running_sequences": ("num_running", "Sequences in the batch."),
    "max_sequences": ("max_num_seqs", "Sequences that can be reserved or running at once."),
    "kv_blocks": ("num_blocks", "KV blocks in the pool."),
    "kv_blocks_used": ("num_used_blocks", "KV blocks held by sequences."),
    "exported_blocks": ("num_exported_blocks", "KV blocks copied out for a hand-off and not yet released."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "tier_fetched_bytes": ("tier_fetched_bytes", "KV bytes brought from the shared tier."),
    "tier_fetch_seconds": ("tier_fetch_s", "Seconds that this took."),
    "tier_given_bytes": ("tier_given_bytes", "KV bytes given to the shared tier."),
    "tier_failures": ("tier_failures", "Times that the shared tier did not give what it has, or not in time."),
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "preemptions": ("preemptions", "Sequences that lost their blocks and were computed again."),
    "engine_steps": ("steps", "Batches run."),
    "expired_leases": ("expired_leases", "Hand-offs given up, the other engine not being heard of."),
    "prefill_steps": ("prefill_steps", "Batches with prompt tokens in them."),
    "prefill_seconds": ("prefill_s", "Seconds of batches with prompt tokens in them."),
    "finished_sequences": ("finished", "Sequences that ended after they had blocks."),
}
_HISTOGRAMS = {
    "engine_ttft_seconds": ("ttft_s", "Arrival at the engine to first token."),
    "engine_itl_seconds": ("itl_s", "Gap between consecutive tokens of a sequence at the engine."),
    "drafted_tokens": ("drafted_tokens", "Drafts that one sequence tried in one step; none are not counted."),
    "accepted_drafts": ("accepted_tokens", "How many of these were right."),
}


class _PoolCollector(Collector):
    """Turns one reading of all replicas into metric families."""

    def __init__(self, pools: dict[str, list[ReplicaStats]]) -> None:
        self._rows = [((pool, stats.replica), stats) for pool, replicas in pools.items() for stats in replicas]

    def collect(self) -> Iterator[Metric]:
        for name, (attribute, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
            for labels, stats in self._rows:
                gauge.add_metric(labels, getattr(stats.engine, attribute))
            yield gauge
        for name, (attribute, text) in _COUNTERS.items():
            yield self._counter(name, text, [getattr(stats.engine, attribute) for _, stats in self._rows])
        yield self._prompt_tokens_by_origin()
        for name, (attribute, text) in _HISTOGRAMS.items():
            yield self._histogram(name, text, [getattr(stats.engine, attribute) for _, stats in self._rows])
        handoffs = [stats.handoff for _, stats in self._rows]
        yield self._counter("handoff_requests", "Prompts handed over whole.", [h.num_requests for h in handoffs])
        yield self._counter("handoff_failures", "Hand-offs that failed.", [h.num_failures for h in handoffs])
        yield self._counter("handoff_chunks", "KV chunks handed over.", [h.num_chunks for h in handoffs])
        yield self._counter("handoff_bytes", "KV bytes handed over.", [h.num_bytes for h in handoffs])
        yield self._histogram(
            "handoff_seconds", "Per chunk, from computed to arrived in the other pool.", [h.seconds for h in handoffs]
        )

    def _prompt_tokens_by_origin(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            f"{PREFIX}prompt_tokens_by_origin",
            "Prompt tokens by where their KV came from: this engine's cache, that of a prefill engine (delta), the"
            " shared tier, or nowhere (miss: computed here).",
            labels=(*_LABELS, "origin"),
        )
        for labels, stats in self._rows:
            engine = stats.engine
            origins = {
                "engine": engine.prefix_hit_tokens - engine.tier_hit_tokens,
                "delta": engine.delta_hit_tokens,
                "tier": engine.tier_hit_tokens,
                "miss": engine.prompt_tokens,
            }
            for origin, num_tokens in origins.items():
                family.add_metric((*labels, origin), num_tokens)
        return family

    def _counter(self, name: str, text: str, values: Sequence[float]) -> CounterMetricFamily:
        family = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
        for (labels, _), value in zip(self._rows, values, strict=True):
            family.add_metric(labels, value)
        return family

    def _histogram(self, name: str, text: str, values: list[Histogram]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(PREFIX + name, text, labels=_LABELS)
        for (labels, _), histogram in zip(self._rows, values, strict=True):
            family.add_metric(labels, cumulative(histogram), histogram.total)
        return family


def render(pools: dict[str, list[ReplicaStats]], clients: ClientMetrics) -> bytes:
    """Prometheus' text exposition of one reading.

    Args:
        pools: the replicas of each pool, by its name.
        clients: of the ingress that answers.
    """
    registry = CollectorRegistry()
    registry.register(_PoolCollector(pools))
    return generate_latest(registry) + generate_latest(clients.registry)
