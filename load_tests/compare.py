"""Several deployments, one scenario, several loads: taking turns, with the same arrivals for all.

Runs are interleaved: each round brings every deployment up once, in another order, and runs all loads, so that a
machine that changes its speed changes it for all. Says what it is doing.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from load_tests.deployments import Deployments, running
from load_tests.measure import Idle, find_target, measure, measure_idle
from load_tests.samples import Run, write_runs
from load_tests.scenario import Scenario

# Of a deployment's turn: once more if the generator did not keep up.
_ATTEMPTS = 2


@dataclass(slots=True)
class Comparison:
    """Runs of all deployments, what those do when idle that were asked, and which were left out."""

    runs: list[Run] = field(default_factory=list)
    idle: dict[str, Idle] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        scenario: what is sent.
        deployments: how to bring each up.
        loads: multipliers of the scenario's arrivals, measured one after the other.
        rounds: their numbers; each has arrivals and prompts of its own.
        idle: deployments that are measured idle, in the first round; None: all.
        leave_out: tells, from what the first one does when idle, which of the others are not worth measuring; None:
            nobody is asked.
    """

    scenario: Scenario
    deployments: Deployments
    loads: Sequence[float]
    rounds: Sequence[int]
    idle: Sequence[str] | None = None
    leave_out: Callable[[Idle], Sequence[str]] | None = None

    def turns(self) -> Iterator[tuple[int, str]]:
        """Each round and deployment, every round in another order."""
        names = list(self.deployments.deployments)
        for round_ in self.rounds:
            shift = round_ % len(names)
            yield from ((round_, name) for name in names[shift:] + names[:shift])

    def wants_idle(self, round_: int, name: str) -> bool:
        return round_ == self.rounds[0] and (self.idle is None or name in self.idle)


def compare(plan: Plan, folder: Path, say: Callable[[str], None]) -> Comparison:
    """Measure every deployment at every load in every round; a run that is not valid is repeated once.

    Args:
        plan: what to measure.
        folder: for logs, the generator's files, and `samples.json`, which is written anew after every run.
        say: told of progress.

    Raises:
        DeploymentError: one did not come up.
        ServiceError: one does not answer requests.
        GeneratorError: the generator is missing or failed.
    """
    found = Comparison()
    folder.mkdir(parents=True, exist_ok=True)
    started, leave_out = time.monotonic(), plan.leave_out

    def tell(what: str) -> None:
        say(f"{(time.monotonic() - started) / 60:5.1f} min  {what}")

    for round_, name in plan.turns():
        if name in found.left_out:
            continue
        missing = list(plan.loads)
        for attempt in range(_ATTEMPTS):
            tell(f"round {round_}: {name}: starting")
            missing = _take_turn(plan, round_, name, missing, found, folder, tell, is_last=attempt + 1 == _ATTEMPTS)
            if not missing:
                break
        if leave_out is not None and name in found.idle:
            # Not the one that is measured already.
            found.left_out = tuple(other for other in leave_out(found.idle[name]) if other != name)
            leave_out = None
    return found


def _take_turn(
    plan: Plan,
    round_: int,
    name: str,
    loads: Sequence[float],
    found: Comparison,
    folder: Path,
    tell: Callable[[str], None],
    is_last: bool,
) -> list[float]:
    """Bring one deployment up and run the loads; returns those to be repeated, on a service that has not seen them."""
    again = []
    log = folder / f"{_file_name(name)}.log"
    deployments = plan.deployments
    with running(name, deployments.deployments[name], deployments.url, deployments.ready_timeout_s, log):
        target = find_target(deployments.url, deployments.model)
        if plan.wants_idle(round_, name) and name not in found.idle:
            found.idle[name] = measure_idle(plan.scenario, target, folder / "idle")
            tell(f"round {round_}: {name}: idle: {_describe_idle(found.idle[name])}")
        for load in loads:
            run = measure(plan.scenario, target, folder / "run", name, load, round_)
            tell(f"round {round_}: {name}: load {load:g}: {_describe(run)}")
            if run.is_valid or is_last:
                found.runs.append(run)
                write_runs(folder / "samples.json", found.runs, {})
            else:
                again.append(load)
    return again


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
