"""What `python -m deployments.simulator` does: plays a trace on each kind of pools, and prints what came of it.

`arguments.py` has what can be asked for.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from deployments.planner.settings import PlannerSettings
from deployments.simulator.advise import Fleet, Kind, cheapest, fleet_costs, play_fixed
from deployments.simulator.curves import LLAMA_8B_H100, FigureError, check_figure, read_figures, with_figures
from deployments.simulator.pools import PoolSetup
from deployments.simulator.requests import Request, TraceError, load_trace
from deployments.simulator.result import Result, play
from deployments.simulator.scaling import Planned, ServeDefault
from deployments.simulator.service import Setup

HEAD = (
    f"{'':36}{'good':>8}{'goodput/s':>11}{'GPU-h':>8}{'GPUs':>7}{'cost':>9}{'good/GPU-h':>12}"
    f"{'TTFT p50':>10}{'p90':>8}{'p99':>8}"
)


_TELL_PERIOD_S = 20.0
_MAX_COST = 1e9


def row(name: str, result: Result) -> str:
    """A line of the table under `HEAD`."""
    return (
        f"{name:36}{result.attainment:8.3f}{result.goodput:11.3f}{result.gpu_hours:8.2f}{result.mean_gpus:7.2f}"
        f"{result.cost:9.2f}{result.per_gpu_hour:12.0f}{result.ttft(0.5):10.2f}{result.ttft(0.9):8.2f}"
        f"{result.ttft(0.99):8.2f}"
    )


def run(options: argparse.Namespace) -> int:
    """Play, print, and plot; 2: what is to be played cannot be."""
    try:
        trace, setup = load_trace(options.trace)[: options.max_requests], _setup(options)
        kinds = _kinds(setup, options.kinds)
    except (TraceError, FigureError) as error:
        print(f"python -m deployments.simulator: error: {error}", file=sys.stderr)
        return 2
    gc.freeze()  # it stays to the end: the collector need not look through a day of requests again and again
    print(HEAD, flush=True)
    results = _advise(trace, setup, kinds, options) if options.advise else _compare(trace, setup, options)
    try:
        _write(results, options)
    except OSError as error:
        print(f"python -m deployments.simulator: error: cannot write what was found: {error}", file=sys.stderr)
        return 1
    return 0 if results else 1


def _write(results: dict[str, Result], options: argparse.Namespace) -> None:
    """Figures and plots, where they are asked for."""
    if options.json:
        options.json.write_text(json.dumps({name: result.figures() for name, result in results.items()}))
    if options.plot and results:
        # Not above: whoever only plays needs no matplotlib.
        from deployments.simulator.plots import save_plot

        save_plot(results, options.plot)


def _setup(options: argparse.Namespace) -> Setup:
    curves = LLAMA_8B_H100.slower(options.slower)
    if options.curves:
        curves = with_figures(curves, read_figures(options.curves), str(options.curves))
    start_s, failure_s = options.start_s, options.failure_s
    pool = PoolSetup(curves, start_s, most=options.most, cost=options.cost, failure_s=failure_s)
    prefill, decode = (replace(pool, least=count) for count in options.least)
    least, by_prefix = options.min_remote_tokens, not options.serve_routing
    tier_tokens = options.tier_tokens
    return Setup(decode, prefill, options.ttft_s, options.itl_s, least, tier_tokens=tier_tokens, by_prefix=by_prefix)


def _compare(trace: list[Request], setup: Setup, options: argparse.Namespace) -> dict[str, Result]:
    settings = PlannerSettings(ttft_s=setup.ttft_s, itl_s=setup.itl_s, start_s=options.start_s)
    planned = Planned(settings)
    results: dict[str, Result] = {}
    if not options.only_fixed:
        results["planned"] = play(_watched(trace, "planned"), setup, planned)
        print(row("planned", results["planned"]), flush=True)
        results["Serve's default"] = play(_watched(trace, "Serve's default"), setup, ServeDefault())
        print(row("Serve's default", results["Serve's default"]), flush=True)
    for prefill, decode in options.fixed:
        fixed = f"{prefill}+{decode}"
        results[fixed] = play_fixed(trace, setup, prefill, decode).result
        print(row(fixed if prefill else f"{decode} colocated", results[fixed]), flush=True)
    if options.reasons:
        for at_s, reason in planned.changes:
            print(f"{at_s:8.0f} s  {reason}")
    return results


def _watched(trace: Sequence[Request], name: str) -> Iterator[Request]:
    """The requests of a trace; tells now and then how many have come."""
    begun_s = told_s = time.monotonic()
    for number, request in enumerate(trace):
        if number % 1000 == 0 and (now_s := time.monotonic()) - told_s > _TELL_PERIOD_S:
            told_s, left_s = now_s, (now_s - begun_s) * (len(trace) / number - 1)
            share = number / len(trace)
            print(f"{name}: {share:.0%} of {len(trace):,} requests, {left_s:.0f} s left", file=sys.stderr, flush=True)
        yield request


def _advise(
    trace: list[Request], setup: Setup, kinds: Sequence[Kind], options: argparse.Namespace
) -> dict[str, Result]:
    def say(fleet: Fleet) -> None:
        print(row(fleet.name, fleet.result), flush=True)

    found = cheapest(trace, setup, options.advise, kinds, say)
    if not found:
        print(
            f"no {2 * options.most} replicas keep TTFT within {setup.ttft_s:g} s and gaps within {setup.itl_s:g} s for "
            f"{options.advise:.0%} of the requests: allow more with --most, or set wider bounds"
        )
        return {}
    print(f"\nkeep the bounds for {options.advise:.0%} of the requests, the cheapest first\n{HEAD}")
    for fleet in found:
        say(fleet)
    best, costs = found[0], sum(fleet_costs(found[0], kinds))
    num_gpus = best.prefill + best.decode
    print(f"\nneeded: {best.name}: {num_gpus} GPU{'s' * (num_gpus > 1)}, which cost {costs:g} an hour")
    return {fleet.name: fleet.result for fleet in found}


def _kinds(setup: Setup, path: Path | None) -> list[Kind]:
    pool = setup.decode
    if path is None:
        return [Kind("", pool.curves, pool.cost)]
    kinds = []
    for name, own in read_figures(path).items():
        where = f"{path}: {name}"
        if not isinstance(own, dict) or "cost" not in own:
            raise FigureError(f"{where}: no cost; each kind needs what an hour of it costs, as in {{'cost': 2.5}}")
        check_figure(f"{where}: cost", own["cost"], 0.0, _MAX_COST)
        others = {key: value for key, value in own.items() if key != "cost"}
        kinds.append(Kind(name, with_figures(pool.curves, others, where), own["cost"]))
    if not kinds:
        raise FigureError(f"{path}: no kind of GPU; at least one is needed")
    return kinds
