"""One run of a scenario against one running service, and what the service does when it is idle.

Puts scenario, schedule and generator together; called by the commands (`run`, `advise`) and by benchmarks.
"""

import json
import os
import statistics
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from load_tests.generator import Target, send
from load_tests.samples import Run, Sample
from load_tests.scenario import Scenario, SloRule
from load_tests.schedule import build_idle_schedule, build_schedule
from load_tests.stats import Slo

IDLE_REQUESTS = 2
# Enough for three of the longest requests of any class on a slow machine.
_IDLE_LIMIT_S = 600.0


class ServiceError(Exception):
    """The service cannot be asked; the message names its address and what it answered."""


@dataclass(frozen=True, slots=True)
class Idle:
    """What requests take that are alone: medians in seconds, TTFT by class and ITL of all."""

    ttft_s: dict[str, float]
    itl_s: float


def find_target(url: str, model: str | None = None) -> Target:
    """Ask a service which model it has; with the key in OPENAI_API_KEY, which is in no report.

    Raises:
        ServiceError: it does not answer, or has no model of that name.
    """
    url, api_key = url.rstrip("/").removesuffix("/v1"), os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(f"{url}/v1/models")
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            names = [entry["id"] for entry in json.load(response)["data"]]
    except (OSError, ValueError, KeyError) as error:
        raise ServiceError(f"{url}/v1/models: {error}; does the service run there?") from None
    if model is not None and model not in names:
        raise ServiceError(f"{url} has no model {model!r}; it has {', '.join(names)}")
    return Target(url, model or names[0], api_key)


def measure(
    scenario: Scenario, target: Target, folder: Path, deployment: str = "service", load: float = 1.0, round_: int = 0
) -> Run:
    """Run a scenario once.

    Args:
        scenario: what to send.
        target: where to.
        folder: for the generator's files; emptied first.
        deployment: name in the report.
        load: multiplier of arrivals.
        round_: runs of the same round, scenario and load send the same at the same times.

    Raises:
        GeneratorError: the generator is missing or failed.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    schedule = build_schedule(scenario, f"{scenario.name}/{round_}/{load:g}", load)
    end_s = scenario.warmup_s + scenario.duration_s
    observed = send(schedule, target, end_s, scenario.drain_s, folder)
    return Run(
        scenario=scenario.name,
        deployment=deployment,
        url=target.url,
        load=load,
        round=round_,
        started_at=started_at,
        warmup_s=scenario.warmup_s,
        duration_s=scenario.duration_s,
        samples=observed.samples,
        generator=observed.health,
        server=observed.server,
    )


def measure_idle(scenario: Scenario, target: Target, folder: Path, seed: str = "idle") -> Idle:
    """Send a few requests of each class, one after the other; the first of each class only warms up.

    Raises:
        ServiceError: some class got no answer.
        GeneratorError: the generator is missing or failed.
    """
    schedule = build_idle_schedule(scenario, seed, IDLE_REQUESTS + 1)
    samples = send(schedule, target, _IDLE_LIMIT_S, 30.0, folder).samples
    return summarise_idle(samples, scenario.class_names(), target.url)


def summarise_idle(samples: Sequence[Sample], class_names: Sequence[str], url: str) -> Idle:
    """Medians of requests that were alone, the first of each class left out.

    Raises:
        ServiceError: some class got no answer.
    """
    by_class = defaultdict(list)
    for sample in samples:
        by_class[sample.request_class].append(sample)
    for name in class_names:
        failed = [sample.error for sample in by_class[name] if sample.error]
        if failed or len(by_class[name]) < 2:
            raise ServiceError(f"{url}, idle: class {name}: {failed[0] if failed else 'too few requests'}")
    counted = {name: own[1:] for name, own in by_class.items()}
    gaps = [gap for own in counted.values() for sample in own for gap in sample.gaps_s]
    ttft_s = {name: statistics.median(s.ttft_s or 0.0 for s in own) for name, own in counted.items()}
    return Idle(ttft_s, statistics.median(gaps) if gaps else 0.0)


def choose_slo(rule: SloRule, idle: Sequence[Idle]) -> Slo:
    """Fix the bounds in seconds; multiples are of the fastest idle system, and hold for all that are compared."""
    names = {name for one in idle for name in one.ttft_s}
    best_s = {name: min(one.ttft_s[name] for one in idle) for name in names}
    ttft_s = {name: rule.ttft_s.get(name, rule.ttft_times_idle * best_s[name]) for name in sorted(names)}
    itl_s = rule.itl_s or rule.itl_times_idle * min(one.itl_s for one in idle)
    return Slo(ttft_s, itl_s, rule.itl_quantile)
