"""What Ray Serve carries to its controller: a flat mapping of names to numbers, and back.

Engines tell their numbers; an ingress how many calls it has refused, and which requests it holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields

from deployments.engine.stats import EngineStats, Histogram
from deployments.load.held import Held

_KINDS = {field.name: type(getattr(EngineStats(), field.name)) for field in fields(EngineStats)}
_HISTOGRAMS = tuple(name for name, kind in _KINDS.items() if kind is Histogram)
_COUNTS = tuple(name for name in _KINDS if name not in _HISTOGRAMS)
_PREFIX = "engine."
REFUSED = "ingress.refused"
HELD, _HELD_TOKENS, _HELD_S = "ingress.held", "ingress.held_tokens", "ingress.held_s"


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


def numbers_of_ingress(num_refused: int, held: Held) -> dict[str, float]:
    """What an ingress replica tells."""
    return {REFUSED: float(num_refused), HELD: float(held.count), _HELD_TOKENS: held.tokens, _HELD_S: held.oldest_s}


def held_of(numbers: Iterable[Mapping[str, float]]) -> Held:
    """What all of them hold that told these."""
    told = [of for of in numbers if of.keys() >= {HELD, _HELD_TOKENS, _HELD_S}]
    oldest_s = max((of[_HELD_S] for of in told), default=0.0)
    return Held(int(sum(of[HELD] for of in told)), int(sum(of[_HELD_TOKENS] for of in told)), oldest_s)
