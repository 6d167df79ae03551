"""What all metrics have in common: their prefix, and our histograms in Prometheus' form."""

from itertools import accumulate

from deployments.engine.stats import Histogram

PREFIX = "kvrelay_"


def cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Bound and count of all up to it, as Prometheus wants buckets."""
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
