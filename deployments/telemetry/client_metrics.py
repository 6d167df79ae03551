"""Numbers of one ingress replica in Prometheus' form: what its clients see, and how it admits and routes."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.api.observer import EndedCall
from deployments.engine.stats import Histogram
from deployments.load.admission import Admission
from deployments.routing.pools import PoolRouters
from deployments.telemetry.families import PREFIX, cumulative


class ClientMetrics(Collector):
    """What the clients of this ingress replica see; an `api.observer.Observer`.

    The histograms are our own: an observation is on the path of every token, and prometheus_client's takes 1.0 us (a
    lock, and a loop over the buckets) where this takes 0.2 (2026-11-25).

    Args:
        followers: told of each call that is over, with its receipt.
    """

    def __init__(self, followers: Sequence[Callable[[EndedCall], None]] = ()) -> None:
        self._followers = followers
        self.registry = CollectorRegistry()
        self._ttft, self._itl = Histogram(), Histogram()
        self.registry.register(self)
        self._finished = Counter(f"{PREFIX}requests", "Calls by how they ended.", ["outcome"], registry=self.registry)
        self._resumed = Counter(
            f"{PREFIX}requests_resumed", "Times that a lost request went on.", registry=self.registry
        )
        self._denied = Counter(
            f"{PREFIX}requests_denied", "Requests refused for their key.", ["reason"], registry=self.registry
        )
        self._in_flight = Gauge(f"{PREFIX}requests_in_flight", "Calls not yet answered.", registry=self.registry)

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

    @property
    def wants_receipts(self) -> bool:
        return bool(self._followers)

    def call_ended(self, call: EndedCall) -> None:
        for follower in self._followers:
            follower(call)

    def collect(self) -> Iterator[Metric]:
        for name, text, histogram in (
            ("ttft_seconds", "Arrival to first token sent.", self._ttft),
            ("itl_seconds", "Gap between consecutive tokens.", self._itl),
        ):
            family = HistogramMetricFamily(PREFIX + name, text)
            family.add_metric([], cumulative(histogram), histogram.total)
            yield family


class AdmissionMetrics(Collector):
    """What the admission of this ingress replica sees and does."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        refusals = CounterMetricFamily(
            f"{PREFIX}refusals", "Calls refused by admission.", labels=("reason", "priority")
        )
        for (reason, priority), count in sorted(self._admission.refusals.items()):
            refusals.add_metric((reason, priority.name.lower()), count)
        yield refusals
        num_readings = self._admission.num_readings
        yield CounterMetricFamily(f"{PREFIX}readings", "Times that it has read the pools' numbers.", value=num_readings)
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
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=("pool",))
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
            f"{PREFIX}routing_choices", "Replicas chosen, by what decided.", labels=("pool", "reason")
        )
        for (pool, reason), count in sorted(self._routers.choices.items()):
            choices.add_metric((pool, reason.value), count)
        yield choices
        promised = CounterMetricFamily(
            f"{PREFIX}routing_promised_tokens",
            "Prompt tokens that the chosen replicas were taken to have cached; prefix_hit_tokens are those they had.",
            labels=("pool",),
        )
        for pool, num_tokens in self._routers.promised_tokens.items():
            promised.add_metric((pool,), num_tokens)
        yield promised
        yield CounterMetricFamily(
            f"{PREFIX}routing_seconds", "Seconds that the choices took.", value=self._routers.seconds
        )
