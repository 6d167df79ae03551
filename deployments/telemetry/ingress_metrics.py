"""Numbers of all ingress replicas in Prometheus' form: what clients see, and how calls are admitted and routed."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from deployments.telemetry.client_stats import ClientStats
from deployments.telemetry.families import Rows, counter, gauge, histogram
from deployments.telemetry.ingress_stats import IngressStats, PoolOutlook
from deployments.telemetry.peers import IngressReading

_INGRESS = ("ingress",)
_POOL = ("ingress", "pool")

_OUTLOOKS = {
    "estimated_wait_seconds": ("wait_s", "Of a prompt that comes now, until its turn comes."),
    "least_wait_seconds": ("least_wait_s", "The optimistic end of the estimated wait."),
    "estimated_queued_tokens": ("queued_tokens", "Prompt tokens before a prompt that comes now."),
    "prefill_speed": ("speed", "Prompt tokens per second of one engine in full steps."),
}
_CLIENT_HISTOGRAMS = {
    "ttft_seconds": ("ttft_s", "Arrival to first token sent."),
    "itl_seconds": ("itl_s", "Gap between consecutive tokens."),
    "e2e_seconds": ("call_s", "Arrival to the end of a call that ended well."),
    "request_prompt_tokens": ("prompt_tokens", "Prompt tokens of a call that ended well."),
    "request_generated_tokens": ("generated_tokens", "Tokens generated for a call that ended well."),
}


class AnswersCollector(Collector):
    """Tells how many ingress replicas a reading is of."""

    def __init__(self, reading: IngressReading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        yield gauge(
            "ingress_replicas",
            "Ingress replicas, by whether they said their numbers, or did not in time and are left out here.",
            ("state",),
            [(("answered",), len(self._reading.replicas)), (("silent",), self._reading.num_silent)],
        )


class IngressCollector(Collector):
    """Turns what ingress replicas say into metric families; the label `ingress` names the replica."""

    def __init__(self, replicas: Sequence[IngressStats]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        yield from self._clients()
        yield from self._admission()
        yield from self._routing()

    def _clients(self) -> Iterator[Metric]:
        rows = [((ingress.replica,), ingress.clients) for ingress in self._replicas]
        yield gauge(
            "requests_in_flight", "Calls not yet answered.", _INGRESS, [(of, c.num_in_flight) for of, c in rows]
        )
        yield counter("requests", "Calls by how they ended.", (*_INGRESS, "outcome"), _by_kind(rows, "finished"))
        yield counter(
            "samples",
            "Samples of calls that ended well.",
            (*_INGRESS, "finish_reason"),
            _by_kind(rows, "finish_reasons"),
        )
        yield counter(
            "requests_denied", "Requests refused for their key.", (*_INGRESS, "reason"), _by_kind(rows, "denied")
        )
        yield counter(
            "requests_resumed", "Times that a lost request went on.", _INGRESS, [(of, c.num_resumed) for of, c in rows]
        )
        for name, (attribute, text) in _CLIENT_HISTOGRAMS.items():
            yield histogram(name, text, _INGRESS, [(of, getattr(clients, attribute)) for of, clients in rows])

    def _admission(self) -> Iterator[Metric]:
        replicas = self._replicas
        yield counter(
            "refusals",
            "Calls refused by admission.",
            (*_INGRESS, "reason", "priority"),
            [((one.replica, *kind), count) for one in replicas for kind, count in one.refusals.items()],
        )
        yield counter(
            "readings",
            "Times that it has read the pools' numbers.",
            _INGRESS,
            [((one.replica,), one.num_readings) for one in replicas],
        )
        yield gauge(
            "requests_held",
            "Requests that wait for a decode replica to start.",
            _INGRESS,
            [((one.replica,), one.held.count) for one in replicas],
        )
        for name, (attribute, text) in _OUTLOOKS.items():
            yield gauge(name, text, _POOL, self._outlooks(attribute))

    def _outlooks(self, attribute: str) -> Rows:
        for ingress in self._replicas:
            outlooks: Mapping[str, PoolOutlook] = ingress.outlooks
            for pool, outlook in outlooks.items():
                yield (ingress.replica, pool), getattr(outlook, attribute)

    def _routing(self) -> Iterator[Metric]:
        replicas = self._replicas
        yield counter(
            "routing_choices",
            "Replicas chosen, by what decided.",
            (*_POOL, "reason"),
            [((one.replica, *kind), count) for one in replicas for kind, count in one.choices.items()],
        )
        yield counter(
            "routing_promised_tokens",
            "Prompt tokens that the chosen replicas were taken to have cached; prefix_hit_tokens are those they had.",
            _POOL,
            [((one.replica, pool), count) for one in replicas for pool, count in one.promised_tokens.items()],
        )
        yield counter(
            "routing_seconds",
            "Seconds that the choices took.",
            _INGRESS,
            [((one.replica,), one.routing_s) for one in replicas],
        )


def _by_kind(rows: Sequence[tuple[tuple[str], ClientStats]], attribute: str) -> Rows:
    for of, clients in rows:
        counts: Mapping[str, int] = getattr(clients, attribute)
        for kind, count in sorted(counts.items()):
            yield (*of, kind), count
