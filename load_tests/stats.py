"""Figures from samples: latency per class, goodput, and how sure a comparison is.

Pure functions of runs. Goodput and its per-request SLOs are DistServe's (Zhong et al., OSDI 2024), except that a
request meets the ITL SLO when `itl_quantile` of its gaps do, since a mean hides stalls; `itl_quantile=None` takes the
mean.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from load_tests.samples import Run, Sample

PERCENTILES = (50, 90, 95, 99)
# Unit of resampling: long enough that what happens in one block says little about the next.
BLOCK_S = 10.0
NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good.

    Attributes:
        ttft_s: bound of the time to first token, by class.
        itl_s: bound of the gaps between tokens.
        itl_quantile: share of a request's gaps that must keep it; None: their mean must.
    """

    ttft_s: dict[str, float]
    itl_s: float
    itl_quantile: float | None = 0.95

    def is_met(self, sample: Sample) -> bool:
        """Whether a request finished and kept both bounds."""
        assert sample.request_class in self.ttft_s, f"no TTFT bound for class {sample.request_class}"
        if sample.error is not None or sample.ttft_s is None or sample.ttft_s > self.ttft_s[sample.request_class]:
            return False
        if self.itl_quantile is None:
            return (sample.tpot_s or 0.0) <= self.itl_s
        return not sample.gaps_s or float(np.quantile(sample.gaps_s, self.itl_quantile)) <= self.itl_s


@dataclass(frozen=True, slots=True)
class Summary:
    """Distribution of one figure in seconds; `percentiles` by their number, such as 99."""

    n: int
    mean: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary | None":
        """Summarise; None where there is nothing."""
        if not values:
            return None
        found = np.percentile(values, PERCENTILES)
        return cls(len(values), float(np.mean(values)), dict(zip(PERCENTILES, map(float, found), strict=True)))


@dataclass(frozen=True, slots=True)
class ClassStats:
    """One class of traffic in the steady state of some runs.

    `longest_gap` is of each request: a stall of seconds, once per answer, is in no percentile of its hundreds of gaps.
    """

    request_class: str
    num_requests: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    ttft: Summary | None
    itl: Summary | None
    tpot: Summary | None
    longest_gap: Summary | None
    e2e: Summary | None

    @property
    def prompt_to_output(self) -> float | None:
        """Prompt tokens per generated token: what decides how much prefill a deployment needs."""
        return self.prompt_tokens / self.output_tokens if self.output_tokens else None


def class_stats(runs: Sequence[Run], request_class: str) -> ClassStats:
    """Put together one class of several runs of the same scenario, deployment and load."""
    samples = [sample for run in runs for sample in run.measured(request_class)]
    done = [sample for sample in samples if sample.error is None]
    return ClassStats(
        request_class=request_class,
        num_requests=len(samples),
        errors=dict(Counter(sample.error for sample in samples if sample.error is not None)),
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        output_tokens=sum(sample.output_tokens for sample in samples),
        ttft=Summary.of([sample.ttft_s for sample in samples if sample.ttft_s is not None]),
        itl=Summary.of([gap for run in runs for gap in run.gaps_s(request_class)]),
        tpot=Summary.of([tpot for sample in done if (tpot := sample.tpot_s) is not None]),
        longest_gap=Summary.of([max(sample.gaps_s) for sample in samples if sample.gaps_s]),
        e2e=Summary.of([e2e for sample in done if (e2e := sample.e2e_s) is not None]),
    )


def goodput(runs: Sequence[Run], slo: Slo) -> float:
    """Requests per second that began in the steady state and met the SLO."""
    good = sum(slo.is_met(sample) for run in runs for sample in run.measured())
    return good / sum(run.duration_s for run in runs)


def attainment(runs: Sequence[Run], slo: Slo, request_class: str | None = None) -> float | None:
    """Share of the requests that met the SLO; None where there were none."""
    samples = [sample for run in runs for sample in run.measured(request_class)]
    return sum(map(slo.is_met, samples)) / len(samples) if samples else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of one figure between two deployments, and how sure it is.

    Attributes:
        value: of all samples.
        low: 2.5th percentile of the resamples.
        high: 97.5th percentile of the resamples.
        probability_above_1: share of the resamples above 1.
    """

    value: float
    low: float
    high: float
    probability_above_1: float


Blocks = list[NDArray[np.float64]]


def goodput_ratio(above: Sequence[Run], below: Sequence[Run], slo: Slo, seed: int = 0) -> Ratio:
    """Goodput of one deployment over another's.

    Raises:
        ValueError: the runs are not of the same rounds.
    """

    def blocks(run: Run) -> Blocks:
        return _by_block(run, [(s.start_s, float(slo.is_met(s))) for s in run.measured()])

    return _ratio(above, below, blocks, np.sum, seed)


def itl_ratio(
    above: Sequence[Run], below: Sequence[Run], request_class: str, percentile: int = 99, seed: int = 0
) -> Ratio:
    """A percentile of one deployment's ITL over another's.

    Raises:
        ValueError: the runs are not of the same rounds.
    """

    def blocks(run: Run) -> Blocks:
        samples = (sample for sample in run.samples if sample.request_class == request_class)
        return _by_block(run, [(end, gap) for s in samples for end, gap in s.gap_ends_s() if run.in_window(end)])

    def statistic(values: NDArray[np.float64]) -> float:
        return float(np.percentile(values, percentile)) if len(values) else 0.0

    return _ratio(above, below, blocks, statistic, seed)


def _by_block(run: Run, timed: Sequence[tuple[float, float]]) -> Blocks:
    blocks: list[list[float]] = [[] for _ in range(max(1, int(run.duration_s // BLOCK_S)))]
    for time_s, value in timed:
        index = min(int((time_s - run.warmup_s) // BLOCK_S), len(blocks) - 1)
        blocks[index].append(value)
    return [np.array(block, dtype=np.float64) for block in blocks]


def _ratio(
    above: Sequence[Run],
    below: Sequence[Run],
    blocks: Callable[[Run], Blocks],
    statistic: Callable[[NDArray[np.float64]], float],
    seed: int,
) -> Ratio:
    """Bootstrap a ratio over blocks of time: the same ones on both sides where these had the same arrivals."""
    rounds = [sorted(run.round for run in runs) for runs in (above, below)]
    if rounds[0] != rounds[1]:
        raise ValueError(f"rounds {rounds[0]} and {rounds[1]}: only runs of the same rounds compare")
    sides = [
        [block for run in sorted(runs, key=lambda run: run.round) for block in blocks(run)] for runs in (above, below)
    ]
    is_paired = {run.load for run in above} == {run.load for run in below}
    rng = np.random.default_rng(seed)

    def resample() -> float:
        first = rng.integers(len(sides[0]), size=len(sides[0]))
        second = first if is_paired else rng.integers(len(sides[1]), size=len(sides[1]))
        chosen = zip(sides, (first, second), strict=True)
        return _quotient(*(statistic(np.concatenate([side[i] for i in indices])) for side, indices in chosen))

    resampled = np.array([resample() for _ in range(NUM_RESAMPLES)])
    low, high = np.percentile(resampled, [2.5, 97.5], method="nearest")
    value = _quotient(*(statistic(np.concatenate(side)) for side in sides))
    return Ratio(value, float(low), float(high), float(np.mean(resampled > 1)))


def _quotient(above: float, below: float) -> float:
    if below:
        return float(above / below)
    return float("inf") if above else 1.0
