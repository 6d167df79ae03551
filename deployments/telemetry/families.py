"""Rows of numbers in Prometheus' form, and the prefix of their names."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from deployments.engine.stats import Histogram

PREFIX = "kvrelay_"

# The values of a family's labels, and its number with these; None: it is not known, and left out.
Rows = Iterable[tuple[Sequence[str], float | None]]


def gauge(name: str, text: str, labels: Sequence[str], rows: Rows, prefix: str = PREFIX) -> GaugeMetricFamily:
    """A number of now."""
    family = GaugeMetricFamily(prefix + name, text, labels=labels)
    for values, number in rows:
        if number is not None:
            family.add_metric(values, number)
    return family


def counter(name: str, text: str, labels: Sequence[str], rows: Rows, prefix: str = PREFIX) -> CounterMetricFamily:
    """A number since the start; Prometheus adds `_total` to its name."""
    family = CounterMetricFamily(prefix + name, text, labels=labels)
    for values, number in rows:
        if number is not None:
            family.add_metric(values, number)
    return family


def histogram(
    name: str,
    text: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Histogram]],
    prefix: str = PREFIX,
) -> HistogramMetricFamily:
    """How often values up to each bound were seen."""
    family = HistogramMetricFamily(prefix + name, text, labels=labels)
    for values, seen in rows:
        family.add_metric(values, cumulative(seen), seen.total)
    return family


def cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Bound and count of all up to it, as Prometheus wants buckets."""
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
