"""Which deployments are worth measuring: the simulator plays the scenario to all of them, from what one does when idle.

It is started as a command, for it lives in the service's environment and not in this one. What it is told is rough:
steps as one idle request shows them, later turns as soon as an idle service would let them come, the bound of TTFT of
the class with most requests. So only what is far behind is left out, and colocated deployments never are.
"""

import json
import shlex
import statistics
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from load_tests.deployments import Deployment
from load_tests.measure import Idle
from load_tests.scenario import Scenario
from load_tests.schedule import Planned, build_schedule
from load_tests.stats import Slo
from load_tests.trace import TraceRow, write_trace

# The simulator may be off by a fifth (docs/measured.md, bench-simulator): what is further behind has lost.
LEAST_SHARE = 0.8


class NarrowError(RuntimeError):
    """The simulator did not run; the message has its command, and what it said."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """What the simulator says.

    Attributes:
        goodput: requests per second within the SLO, at the load at which it is highest, by deployment.
        dropped: deployments that are not worth measuring.
    """

    goodput: dict[str, float]
    dropped: tuple[str, ...]


def narrow(
    command: str,
    scenario: Scenario,
    deployments: Mapping[str, Deployment],
    loads: Sequence[float],
    idle: Idle,
    slo: Slo,
    folder: Path,
    run: Callable[[Sequence[str]], None] | None = None,
) -> Narrowing:
    """Play all loads to all deployments.

    Args:
        command: that starts the simulator, with further arguments of it.
        scenario: what would be sent.
        deployments: that would be measured.
        loads: multipliers of the scenario's arrivals.
        idle: what one of them does when it is idle.
        slo: to be kept.
        folder: for the simulator's files.
        run: starts a command; else a process is started.

    Raises:
        NarrowError: the simulator did not run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    curves = folder / "curves.json"
    goodput: dict[str, float] = defaultdict(float)
    pools = {name: f"{one.num_prefill}+{one.num_decode}" for name, one in deployments.items()}
    for load in loads:
        schedule = build_schedule(scenario, f"{scenario.name}/0/{load:g}", load)
        curves.write_text(json.dumps(rough_curves(schedule, idle)))
        rows = arrivals(schedule, idle, scenario.warmup_s + scenario.duration_s)
        trace, found = folder / f"load-{load:g}.csv", folder / f"load-{load:g}.json"
        write_trace(trace, rows)
        most = Counter(request.request_class for request in schedule).most_common(1)[0][0]
        bounds = ["--ttft-s", f"{slo.ttft_s[most]:g}", "--itl-s", f"{slo.itl_s:g}"]
        fixed = ["--only-fixed", "--fixed", *dict.fromkeys(pools.values())]
        arguments = [str(trace), *bounds, "--curves", str(curves), "--json", str(found), *fixed]
        (run or _run)([*shlex.split(command), *arguments])
        results = json.loads(found.read_text())
        for name, own in pools.items():
            goodput[name] = max(goodput[name], results[own]["goodput"])
    return Narrowing(dict(goodput), dropped(goodput, deployments))


def dropped(goodput: Mapping[str, float], deployments: Mapping[str, Deployment]) -> tuple[str, ...]:
    """Disaggregated deployments that are far behind the best of them."""
    split = [name for name, one in deployments.items() if not one.is_colocated]
    best = max((goodput[name] for name in split), default=0.0)
    return tuple(name for name in split if goodput[name] < LEAST_SHARE * best)


def rough_curves(schedule: Sequence[Planned], idle: Idle) -> dict[str, float]:
    """The simulator's figures that an idle service shows: a step for one sequence, and what a prompt token adds to it.

    A sequence is taken to cost what a prompt token does, which is as much to compute.
    """
    prompts: dict[str, list[int]] = defaultdict(list)
    for request in schedule:
        if request.turn == 0 or request.at_s is None:
            prompts[request.request_class].append(len(request.prompt))
    tokens = {name: statistics.mean(own) for name, own in prompts.items()}
    # The longest class tells it best: least of its TTFT is for the step and the way.
    longest = max(tokens, key=lambda name: tokens[name])
    token_s = max(0.0, idle.ttft_s[longest] - idle.itl_s) / tokens[longest]
    return {"step_s": max(0.0, idle.itl_s - token_s), "token_s": token_s, "sequence_s": token_s, "context_s": 0.0}


def arrivals(schedule: Sequence[Planned], idle: Idle, end_s: float) -> list[TraceRow]:
    """When requests would come to a service that is as fast as an idle one; later turns follow those before them."""
    free_s: dict[str, float] = {}
    rows: list[TraceRow] = []
    for request in schedule:
        begin_s = free_s.get(request.session, 0.0)
        at_s = begin_s + request.delay_s if request.at_s is None else request.at_s
        answer_s = idle.ttft_s.get(request.request_class, 0.0) + request.output_tokens * idle.itl_s
        free_s[request.session] = at_s + answer_s
        if at_s < end_s:
            rows.append(TraceRow(at_s, len(request.prompt), request.output_tokens, ()))
    return sorted(rows, key=lambda row: row.arrival_s)


def _run(command: Sequence[str]) -> None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NarrowError(f"{shlex.join(command)}: {error}") from None
    if ran.returncode:
        raise NarrowError(f"{shlex.join(command)}: ended with status {ran.returncode}: {ran.stderr.strip()[-500:]}")
