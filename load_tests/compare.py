"""Several deployments, one scenario, several loads: taking turns, with the same arrivals for all.

Runs are interleaved: each round brings every deployment up once, in another order, and runs all loads, so that a
machine that changes its speed changes it for all. Says what it is doing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from load_tests.deployments import Deployments, running
from load_tests.measure import Idle, find_target, measure, measure_idle
from load_tests.samples import Run
from load_tests.scenario import Scenario


@dataclass(slots=True)
class Comparison:
    """Runs of all deployments, and what each does when idle."""

    runs: list[Run] = field(default_factory=list)
    idle: dict[str, Idle] = field(default_factory=dict)


def compare(
    scenario: Scenario,
    deployments: Deployments,
    loads: Sequence[float],
    num_rounds: int,
    folder: Path,
    say: Callable[[str], None],
    first_round: int = 0,
) -> Comparison:
    """Measure every deployment at every load, `num_rounds` times.

    Raises:
        DeploymentError: one did not come up.
        ServiceError: one does not answer requests.
        GeneratorError: the generator is missing or failed.
    """
    found = Comparison()
    names = list(deployments.deployments)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def tell(what: str) -> None:
        say(f"{(time.monotonic() - started) / 60:5.1f} min  {what}")

    for round_ in range(first_round, first_round + num_rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            tell(f"round {round_}: {name}: starting")
            deployment = deployments.deployments[name]
            log = folder / f"{_file_name(name)}.log"
            with running(name, deployment, deployments.url, deployments.ready_timeout_s, log):
                target = find_target(deployments.url, deployments.model)
                if round_ == first_round:
                    found.idle[name] = measure_idle(scenario, target, folder / "idle")
                    tell(f"round {round_}: {name}: idle: {_describe_idle(found.idle[name])}")
                for load in loads:
                    run = measure(scenario, target, folder / "run", name, load, round_)
                    found.runs.append(run)
                    tell(f"round {round_}: {name}: load {load:g}: {_describe(run)}")
    return found


def _describe(run: Run) -> str:
    failed = sum(sample.error is not None for sample in run.measured())
    lag_ms = run.generator.lag_s["p99"] * 1e3
    words = f"{len(run.measured())} requests, {failed} failed, generator's lag p99 {lag_ms:.0f} ms"
    return words if run.is_valid else f"{words}; INVALID: {'; '.join(run.generator.problems)}"


def _describe_idle(idle: Idle) -> str:
    ttft = ", ".join(f"{name} {ttft_s:.3f} s" for name, ttft_s in idle.ttft_s.items())
    return f"TTFT {ttft}; ITL {idle.itl_s * 1e3:.1f} ms"


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)
