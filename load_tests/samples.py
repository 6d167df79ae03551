"""What one run of a scenario measured, request by request; the raw data that every figure and plot is made from.

Owns the record of a request and of a run, and their JSON. Knows neither the generator nor how figures are computed.
Times are seconds since the run's first planned instant, on the client's clock.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it.

    Attributes:
        request_class: name of its class of traffic.
        session: its session; requests of one session follow each other.
        turn: position in the session, from 0.
        planned_s: when the schedule wanted it sent; None: as soon as the turn before had ended.
        sent_s: when it was sent; None: it never was.
        ttft_s: from sending to the first streamed token; None: none came.
        gaps_s: ITL, between consecutive streamed tokens.
        end_s: when the answer ended; None: it was never sent.
        prompt_tokens: as planned.
        output_tokens: as the server counted them.
        error: kind of failure; None: it finished.
    """

    request_class: str
    session: str
    turn: int
    planned_s: float | None
    sent_s: float | None
    ttft_s: float | None
    gaps_s: tuple[float, ...]
    end_s: float | None
    prompt_tokens: int
    output_tokens: int
    error: str | None = None

    @property
    def start_s(self) -> float:
        """When it was sent, or should have been."""
        start = self.sent_s if self.sent_s is not None else self.planned_s
        assert start is not None, f"{self.session} turn {self.turn} has neither been planned nor sent"
        return start

    @property
    def e2e_s(self) -> float | None:
        """From sending to the end of the answer; None where it failed."""
        if self.error is not None or self.end_s is None or self.sent_s is None:
            return None
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two."""
        return sum(self.gaps_s) / (self.output_tokens - 1) if self.gaps_s and self.output_tokens > 1 else None

    def gap_ends_s(self) -> Iterable[tuple[float, float]]:
        """Each gap as (when it ended, its length)."""
        if self.sent_s is None or self.ttft_s is None:
            return
        now = self.sent_s + self.ttft_s
        for gap in self.gaps_s:
            now += gap
            yield now, gap


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """Whether the generator kept up with its own schedule.

    Attributes:
        lag_s: p50, p99 and max of sent minus planned.
        cpu: share of one core that each of its processes used, by name.
        problems: why the run is invalid, in words; empty: it is valid.
    """

    lag_s: dict[str, float]
    cpu: dict[str, float]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one scenario against one deployment.

    Attributes:
        scenario: its name.
        deployment: name of what was measured, such as `colocated`.
        url: where it was.
        load: multiplier of the scenario's arrival rates.
        round: runs of one round had the same schedule; the schedule's seed.
        started_at: UTC, ISO 8601.
        warmup_s: length of the beginning that is not counted.
        duration_s: length of the steady state, which is.
        samples: every request, warm-up included.
        generator: how the generator did.
        server: figures from the server's /metrics, by name; {} where it has none.
    """

    scenario: str
    deployment: str
    url: str
    load: float
    round: int
    started_at: str
    warmup_s: float
    duration_s: float
    samples: tuple[Sample, ...]
    generator: GeneratorHealth
    server: dict[str, float] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        """Whether the generator kept up."""
        return not self.generator.problems

    @property
    def end_s(self) -> float:
        """End of the steady state."""
        return self.warmup_s + self.duration_s

    def in_window(self, time_s: float) -> bool:
        """Whether an instant lies in the steady state."""
        return self.warmup_s <= time_s < self.end_s

    def classes(self) -> list[str]:
        """Classes of traffic, in the order of their first request."""
        return list(dict.fromkeys(sample.request_class for sample in self.samples))

    def measured(self, request_class: str | None = None) -> list[Sample]:
        """Requests that began in the steady state, of one class or of all."""
        return [
            sample
            for sample in self.samples
            if request_class in (None, sample.request_class) and self.in_window(sample.start_s)
        ]

    def gaps_s(self, request_class: str) -> list[float]:
        """Gaps that ended in the steady state, whenever their request began."""
        samples = (sample for sample in self.samples if sample.request_class == request_class)
        return [gap for sample in samples for end, gap in sample.gap_ends_s() if self.in_window(end)]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Rebuild a run from what `asdict` made of it."""
        samples = tuple(Sample(**{**s, "gaps_s": tuple(s["gaps_s"])}) for s in values["samples"])
        health = values["generator"]
        generator = GeneratorHealth(health["lag_s"], health["cpu"], tuple(health["problems"]))
        return cls(**{**values, "samples": samples, "generator": generator})


def write_runs(path: Path, runs: Iterable[Run], about: dict[str, Any]) -> None:
    """Write the raw data of some runs and what is needed to reproduce them."""
    path.write_text(json.dumps({"about": about, "runs": [asdict(run) for run in runs]}))


def read_runs(path: Path) -> tuple[list[Run], dict[str, Any]]:
    """Read what `write_runs` wrote: the runs, and what is needed to reproduce them."""
    values = json.loads(path.read_text())
    return [Run.from_json(run) for run in values["runs"]], values["about"]
