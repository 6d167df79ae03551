"""What Ray Serve carries to its controller: a flat mapping of names to numbers, and back.

Engines tell their numbers; an ingress, under `REFUSED`, how many calls it has refused.
"""

from collections.abc import Mapping
from dataclasses import fields

from deployments.engine.stats import EngineStats, Histogram

_KINDS = {field.name: type(getattr(EngineStats(), field.name)) for field in fields(EngineStats)}
_HISTOGRAMS = tuple(name for name, kind in _KINDS.items() if kind is Histogram)
_COUNTS = tuple(name for name in _KINDS if name not in _HISTOGRAMS)
_PREFIX = "engine."
REFUSED = "ingress.refused"


def to_numbers(stats: EngineStats) -> dict[str, float]:
    """What a replica tells."""
    numbers = {f"{_PREFIX}{name}": float(getattr(stats, name)) for name in _COUNTS}
    for name in _HISTOGRAMS:
        histogram: Histogram = getattr(stats, name)
        numbers[f"{_PREFIX}{name}"] = histogram.total
        numbers |= {f"{_PREFIX}{name}.{i}": float(count) for i, count in enumerate(histogram.counts)}
    return numbers


def of_numbers(numbers: Mapping[str, float]) -> EngineStats | None:
    """What it told; None: it has told nothing, or was of another version."""
    stats = EngineStats()
    try:
        for name in _COUNTS:
            setattr(stats, name, _KINDS[name](numbers[f"{_PREFIX}{name}"]))
        for name in _HISTOGRAMS:
            histogram: Histogram = getattr(stats, name)
            histogram.total = numbers[f"{_PREFIX}{name}"]
            histogram.counts = [int(numbers[f"{_PREFIX}{name}.{i}"]) for i in range(len(histogram.counts))]
    except KeyError:
        return None
    return stats
