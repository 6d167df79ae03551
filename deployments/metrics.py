"""Numbers of the service, in Prometheus' text form: per pool and replica from the engines, and as clients see it.

Knows what each number is called; the engines, fronts and the ingress keep the numbers themselves.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.engine.stats import Histogram
from deployments.load.admission import Admission
from deployments.replica_stats import ReplicaStats
from deployments.routing.pools import PoolRouters

_PREFIX = "kvrelay_"
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


class ClientMetrics(Collector):
    """What the clients of this ingress replica see; an `api.observer.Observer`.

    The histograms are our own: an observation is on the path of every token, and prometheus_client's takes 1.0 us (a
    lock, and a loop over the buckets) where this takes 0.2 (2026-11-25).
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ttft, self._itl = Histogram(), Histogram()
        self.registry.register(self)
        self._finished = Counter(f"{_PREFIX}requests", "Calls by how they ended.", ["outcome"], registry=self.registry)
        self._resumed = Counter(
            f"{_PREFIX}requests_resumed", "Times that a lost request went on.", registry=self.registry
        )
        self._denied = Counter(
            f"{_PREFIX}requests_denied", "Requests refused for their key.", ["reason"], registry=self.registry
        )
        self._in_flight = Gauge(f"{_PREFIX}requests_in_flight", "Calls not yet answered.", registry=self.registry)

    def request_started(self) -> None:
        self._in_flight.inc()

    def request_denied(self, reason: str) -> None:
        self._denied.labels(reason).inc()

    def request_resumed(self) -> None:
        """Its decode replica was lost, and another goes on with it."""
        self._resumed.inc()

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float, num_tokens: int) -> None:
        self._itl.observe(seconds, num_tokens)

    def request_finished(self, outcome: str) -> None:
        self._in_flight.dec()
        self._finished.labels(outcome).inc()

    def collect(self) -> Iterator[Metric]:
        for name, text, histogram in (
            ("ttft_seconds", "Arrival to first token sent.", self._ttft),
            ("itl_seconds", "Gap between consecutive tokens.", self._itl),
        ):
            family = HistogramMetricFamily(_PREFIX + name, text)
            family.add_metric([], _cumulative(histogram), histogram.total)
            yield family


class AdmissionMetrics(Collector):
    """What the admission of this ingress replica sees and does."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        refusals = CounterMetricFamily(
            f"{_PREFIX}refusals", "Calls refused by admission.", labels=("reason", "priority")
        )
        for (reason, priority), count in sorted(self._admission.refusals.items()):
            refusals.add_metric((reason, priority.name.lower()), count)
        yield refusals
        num_readings = self._admission.num_readings
        yield CounterMetricFamily(
            f"{_PREFIX}readings", "Times that it has read the pools' numbers.", value=num_readings
        )
        outlooks = {pool: self._admission.outlook(pool) for pool in self._admission.pools}
        for name, text, values in (
            ("estimated_wait_seconds", "Of a prompt that comes now.", {p: o.wait.best for p, o in outlooks.items()}),
            ("least_wait_seconds", "Its optimistic end.", {p: o.wait.low for p, o in outlooks.items()}),
            ("estimated_queued_tokens", "Prompt tokens before it.", {p: o.queued_tokens for p, o in outlooks.items()}),
            (
                "prefill_speed",
                "Prompt tokens per second of one engine in full steps.",
                {p: o.speed for p, o in outlooks.items()},
            ),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=("pool",))
            for pool, value in values.items():
                if value is not None:
                    gauge.add_metric((pool,), value)
            yield gauge


class RoutingMetrics(Collector):
    """How this ingress replica chose the replicas of requests. What they had cached is told by the engines."""

    def __init__(self, routers: PoolRouters) -> None:
        self._routers = routers

    def collect(self) -> Iterator[Metric]:
        choices = CounterMetricFamily(
            f"{_PREFIX}routing_choices", "Replicas chosen, by what decided.", labels=("pool", "reason")
        )
        for (pool, reason), count in sorted(self._routers.choices.items()):
            choices.add_metric((pool, reason.value), count)
        yield choices
        promised = CounterMetricFamily(
            f"{_PREFIX}routing_promised_tokens",
            "Prompt tokens that the chosen replicas were taken to have cached; prefix_hit_tokens are those they had.",
            labels=("pool",),
        )
        for pool, num_tokens in self._routers.promised_tokens.items():
            promised.add_metric((pool,), num_tokens)
        yield promised
        yield CounterMetricFamily(
            f"{_PREFIX}routing_seconds", "Seconds that the choices took.", value=self._routers.seconds
        )


class _PoolCollector(Collector):
    """Turns one reading of all replicas into metric families."""

    def __init__(self, pools: dict[str, list[ReplicaStats]]) -> None:
        self._rows = [((pool, stats.replica), stats) for pool, replicas in pools.items() for stats in replicas]

    def collect(self) -> Iterator[Metric]:
        for name, (attribute, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=_LABELS)
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
            f"{_PREFIX}prompt_tokens_by_origin",
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
        family = CounterMetricFamily(_PREFIX + name, text, labels=_LABELS)
        for (labels, _), value in zip(self._rows, values, strict=True):
            family.add_metric(labels, value)
        return family

    def _histogram(self, name: str, text: str, values: list[Histogram]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(_PREFIX + name, text, labels=_LABELS)
        for (labels, _), histogram in zip(self._rows, values, strict=True):
            family.add_metric(labels, _cumulative(histogram), histogram.total)
        return family


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Bound and count of all up to it, as Prometheus wants buckets."""
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def render(pools: dict[str, list[ReplicaStats]], clients: ClientMetrics) -> bytes:
    """Prometheus' text exposition of one reading.

    Args:
        pools: the replicas of each pool, by its name.
        clients: of the ingress that answers.
    """
    registry = CollectorRegistry()
    registry.register(_PoolCollector(pools))
    return generate_latest(registry) + generate_latest(clients.registry)
