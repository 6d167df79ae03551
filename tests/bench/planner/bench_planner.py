"""The planner against the best fixed split known in hindsight and Ray Serve's default policy, in the simulator.

Run: `make bench-planner`. Plays four traces: bursty chat, a day of long prompts, a mix that shifts, and, where it is
there, the Mooncake conversation trace. On each, fixed pools get the planner's GPU-hours, rounded up to whole replicas,
and the split of them that turns out best. Then each with replicas that take 0 to 300 s to start, from the pools of that
split: from 1 + 1 a trace that begins with full load tells of its first minutes alone. Prints tables and, as its last
line, one JSON object; ends with 1 if a bound is not met.

Engines are ten times slower than Llama-3.1-8B's on an H100, so that an hour of traffic is 10,000 requests and not
100,000; the bounds of TTFT and gaps are as much longer.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deployments.planner.settings import PlannerSettings
from deployments.simulator.advise import best_split, play_fixed
from deployments.simulator.arguments import number, whole
from deployments.simulator.command import HEAD, row
from deployments.simulator.curves import LLAMA_8B_H100
from deployments.simulator.plots import save_plot
from deployments.simulator.pools import PoolSetup
from deployments.simulator.requests import Request, load_trace
from deployments.simulator.result import play
from deployments.simulator.scaling import Planned, ServeDefault
from deployments.simulator.service import Setup
from tests.bench.planner.traces import bursty_chat, long_context_day, shifting_mix

MOONCAKE = Path("../shared/traces/mooncake_conversation.jsonl")
SLOWER, TTFT_S, ITL_S = 10.0, 5.0, 0.12
# Of traces of long prompts: one of 12,000 tokens alone takes 3 s.
LONG_TTFT_S = 15.0
TRACES = ("bursty chat", "long-context day", "shifting mix", "mooncake conversation")
STARTS_S = (0.0, 30.0, 60.0, 120.0, 300.0)
BOUNDS = {"of_hindsight": 0.95, "of_default_per_gpu_hour": 1.5, "cliff": 0.9}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of a trace, played in every way.

    Attributes:
        of_hindsight: goodput over that of the best fixed split at the same GPU-hours.
        of_hindsight_warm: the same where the planner, too, begins with the pools of that split; else with 1 + 1.
        of_default_per_gpu_hour: good requests per GPU-hour over those of Ray Serve's default.
        num_changes: that the planner made.
    """

    of_hindsight: float
    of_hindsight_warm: float
    of_default_per_gpu_hour: float
    num_changes: int
    planned: dict[str, float]
    planned_warm: dict[str, float]
    best_fixed: dict[str, float]
    colocated: dict[str, float] | None
    default: dict[str, float]


def setup_of(start_s: float, ttft_s: float = TTFT_S) -> Setup:
    pool = PoolSetup(LLAMA_8B_H100.slower(SLOWER), start_s, most=32)
    return Setup(pool, pool, ttft_s, ITL_S)


def settings_of(setup: Setup) -> PlannerSettings:
    return PlannerSettings(ttft_s=setup.ttft_s, itl_s=ITL_S, start_s=setup.decode.start_s)


def begin_with(setup: Setup, prefill: int, decode: int) -> Setup:
    """The service, with so many replicas of both pools at the beginning."""
    assert setup.prefill is not None
    return replace(
        setup,
        decode=replace(setup.decode, initial=decode),
        prefill=replace(setup.prefill, initial=prefill),
    )


@dataclass(frozen=True, slots=True)
class Task:
    """A trace to play; `starts`: with replicas that take longer and longer to start as well."""

    name: str
    trace: Sequence[Request]
    setup: Setup
    plot: Path | None
    with_colocated: bool
    starts: bool


def play_task(task: Task) -> tuple[Comparison, dict[str, dict[str, float]]]:
    """Play a trace in every way; what came of each, and by start-up time."""
    compared = compare(task.name, task.trace, task.setup, task.plot, task.with_colocated)
    best = compared.best_fixed
    begun = begin_with(task.setup, int(best["prefill"]), int(best["decode"]))
    return compared, by_start(task.name, task.trace, begun) if task.starts else {}


def compare(name: str, trace: Sequence[Request], setup: Setup, plot: Path | None, with_colocated: bool) -> Comparison:
    """Play a trace in every way; what came of each."""
    rows = [HEAD]
    scaler = Planned(settings_of(setup))
    planned = play(trace, setup, scaler)
    rows.append(row("planned", planned))
    total = max(2, math.ceil(planned.mean_gpus - 1e-6))
    served = {pool: sum(ready for *_, ready in history) for pool, history in planned.history.items()}
    best = best_split(trace, setup, total, served["prefill"] / sum(served.values()))
    rows.append(row(f"best fixed, {best.prefill} + {best.decode}", best.result))
    warm = play(trace, begin_with(setup, best.prefill, best.decode), Planned(settings_of(setup)))
    rows.append(row(f"planned, from {best.prefill} + {best.decode}", warm))
    colocated = play_fixed(trace, setup, 0, total).result if with_colocated else None
    if colocated is not None:
        rows.append(row(f"{total} colocated", colocated))
    default = play(trace, setup, ServeDefault())
    rows.append(row("Serve's default", default))
    # At once: other traces are played beside this one.
    heading = f"\n{name}: {len(trace)} requests, first tokens within {setup.ttft_s:g} s"
    print("\n".join((heading, *rows)), flush=True)
    if plot is not None:
        results = {"planned": planned, f"fixed {best.prefill} + {best.decode}": best.result, "Serve's default": default}
        save_plot(results, plot / f"{name.replace(' ', '-')}.png")
    # The fixed pools are rounded up to whole replicas, in their favour.
    return Comparison(
        planned.goodput / best.result.goodput,
        warm.goodput / best.result.goodput,
        planned.per_gpu_hour / default.per_gpu_hour,
        len(scaler.changes),
        planned.figures(),
        warm.figures(),
        best.result.figures() | {"prefill": best.prefill, "decode": best.decode},
        None if colocated is None else colocated.figures(),
        default.figures(),
    )


def by_start(name: str, trace: Sequence[Request], setup: Setup) -> dict[str, dict[str, float]]:
    """The same trace with replicas that take longer and longer to start."""
    found, rows = {}, [HEAD]
    for start_s in STARTS_S:
        assert setup.prefill is not None
        pools = replace(setup.decode, start_s=start_s), replace(setup.prefill, start_s=start_s)
        own = replace(setup, decode=pools[0], prefill=pools[1])
        result = play(trace, own, Planned(settings_of(own)))
        rows.append(row(f"planned, {start_s:g} s to start", result))
        found[f"{start_s:g}"] = result.figures()
    print("\n".join((f"\n{name}, by the time that a replica takes to start", *rows)), flush=True)
    return found


def judge(compared: dict[str, Comparison], starts: dict[str, dict[str, dict[str, float]]]) -> dict[str, bool]:
    """Which bounds are met, of those that what was played tells of."""
    passed = {"of_hindsight": all(c.of_hindsight >= BOUNDS["of_hindsight"] for c in compared.values())}
    if mix := compared.get("shifting mix"):
        passed["of_default_per_gpu_hour"] = mix.of_default_per_gpu_hour >= BOUNDS["of_default_per_gpu_hour"]
    if starts:
        kept = (rows["120"]["attainment"] / rows["0"]["attainment"] for rows in starts.values())
        passed["cliff"] = min(kept) >= BOUNDS["cliff"]
    return passed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What is to be played."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mooncake", type=Path, default=MOONCAKE)
    parser.add_argument("--start-s", type=number(0, 3600), default=30.0, help="a replica takes to start")
    parser.add_argument(
        "--length", type=number(0.01, 100), default=1.0, help="of the drawn traces, in parts of the whole"
    )
    parser.add_argument(
        "--traces", nargs="+", choices=TRACES, metavar="NAME", help=f"these alone of {', '.join(TRACES)}"
    )
    parser.add_argument("--no-starts", action="store_true", help="leave the tables by start-up time out")
    parser.add_argument("--jobs", type=whole(1, 1024), default=os.cpu_count(), help="traces that are played at once")
    parser.add_argument("--no-colocated", action="store_true", help="leave the slowest row out")
    parser.add_argument("--plot", type=Path, help="folder for plots")
    args = parser.parse_args(arguments)
    if not args.mooncake.exists():
        if "mooncake conversation" in (args.traces or ()):
            parser.error(f"--traces: there is no trace at {args.mooncake}; name it with --mooncake")
        print(f"no trace at {args.mooncake}, so it is left out", file=sys.stderr)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Play all, print, and judge."""
    args = parse(arguments)
    draws: dict[str, Callable[[], list[Request]]] = {
        "bursty chat": lambda: bursty_chat(5400 * args.length),
        "long-context day": lambda: long_context_day(14_400 * args.length),
        "shifting mix": lambda: shifting_mix(7200 * args.length),
    }
    if args.mooncake.exists():
        draws["mooncake conversation"] = lambda: [
            replace(request) for request in load_trace(args.mooncake) if request.at_s < 3600 * args.length
        ]
    bounds_s = {"long-context day": LONG_TTFT_S, "mooncake conversation": LONG_TTFT_S}
    setups = {name: setup_of(args.start_s, bounds_s.get(name, TTFT_S)) for name in draws}
    tasks = [
        Task(name, draws[name](), setups[name], args.plot, not args.no_colocated, not args.no_starts)
        for name in draws
        if name in (args.traces or draws)
    ]
    # The longest first.
    tasks.sort(key=lambda task: -len(task.trace))
    with ProcessPoolExecutor(args.jobs) as processes:
        played = dict(zip([task.name for task in tasks], processes.map(play_task, tasks), strict=True))
    compared = {name: one for name, (one, _) in played.items()}
    starts = {name: rows for name, (_, rows) in played.items() if rows}
    passed = judge(compared, starts)
    print()
    for name, is_met in passed.items():
        print(f"{name}: bound {BOUNDS[name]} {'met' if is_met else 'NOT met'}")
    given = {name: str(value) for name, value in vars(args).items()}
    report = {
        "bench": "planner",
        "args": given,
        "traces": {n: asdict(c) for n, c in compared.items()},
        "by_start_s": starts,
    }
    print(json.dumps(report | {"bounds": BOUNDS, "passed": passed}))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
