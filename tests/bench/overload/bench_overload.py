"""The service when more is asked of it than it can do: what it still does in time, and how fast it refuses the rest.

Run: `make bench-overload`. Brings the graph up as `make serve` does, with one prefill and one decode engine, twice: the
first lets everybody in, for the SLO, which is a multiple of what an idle system takes, and for the capacity, with
streams that are always open. The second keeps that TTFT, while requests arrive at random, at 0.5 to 3 times the
capacity. Prints a table and, as its last line, one JSON object. Ends with 1 if goodput at the highest load is below 90%
of the best, or a refusal took more than 50 ms; with 2, and no verdict, if the generator was late or the machine was not
ours: beside other processes neither the capacity nor what is in time is that of the service.
"""

import argparse
import json
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from app.local_process import RunFolder
from load_tests.environment import describe
from load_tests.measure import IDLE_REQUESTS, choose_slo, summarise_idle
from load_tests.samples import Run, Sample, write_runs
from load_tests.scenario import Arrivals, Scenario, load_scenario
from load_tests.schedule import build_idle_schedule, build_schedule
from load_tests.stats import Slo, Summary, goodput
from tests.bench.cpu_use import CpuUse
from tests.bench.player import play, run
from tests.bench.service import serving

HERE = Path(__file__).parent
FOLDER = RunFolder(Path(".run/overload"))
MODEL = "smollm2-135m-instruct"
CLASS = "chat"
# Enough that a prompt always waits for the prefill engine.
CAPACITY_STREAMS = 6
LETS_EVERYBODY_IN = "ingress.max_ttft_s=3600"
CAPACITY_WARMUP_S, CAPACITY_DURATION_S = 10.0, 30.0
REFUSED = "HTTP 429"
MIN_GOODPUT_RATIO = 0.9
MAX_REFUSAL_S = 0.05
MAX_OTHERS_CORES = 0.15


def find_slo(scenario: Scenario, port: int) -> Slo:
    """The bounds in seconds, multiples of what an idle system takes."""
    schedule = build_idle_schedule(scenario, "idle", IDLE_REQUESTS + 1)
    samples = play(schedule, port, MODEL, end_s=60.0, drain_s=30.0)
    return choose_slo(scenario.slo, [summarise_idle(samples, scenario.class_names(), f"port {port}")])


def find_capacity(scenario: Scenario, port: int) -> float:
    """Requests per second that end while some always wait.

    Raises:
        RuntimeError: some failed, so that this is no capacity.
    """
    traffic = scenario.classes[CLASS].model_copy(update={"arrivals": Arrivals(streams=CAPACITY_STREAMS)})
    times = {"warmup_s": CAPACITY_WARMUP_S, "duration_s": CAPACITY_DURATION_S}
    closed = scenario.model_copy(update={"classes": {CLASS: traffic}, **times})
    end_s = CAPACITY_WARMUP_S + CAPACITY_DURATION_S
    samples = play(build_schedule(closed, "capacity"), port, MODEL, end_s, scenario.drain_s)
    if errors := Counter(sample.error for sample in samples if sample.error is not None):
        raise RuntimeError(f"requests failed while the capacity was measured: {dict(errors)}")
    ended = sum(CAPACITY_WARMUP_S <= (sample.end_s or 0.0) < end_s for sample in samples)
    return ended / CAPACITY_DURATION_S


def refusal_s(samples: Sequence[Sample]) -> list[float]:
    """How long each refused request waited for its answer."""
    refused = [sample for sample in samples if sample.error == REFUSED]
    return [s.end_s - s.sent_s for s in refused if s.end_s is not None and s.sent_s is not None]


def summarise(one: Run, slo: Slo, factor: float) -> dict[str, Any]:
    """Figures of one run; refusals are those of all its requests, warm-up included."""
    samples, refusals = one.measured(), refusal_s(one.samples)
    ttft = Summary.of([sample.ttft_s for sample in samples if sample.ttft_s is not None])
    itl = Summary.of(one.gaps_s(CLASS))
    finished = [sample for sample in samples if sample.error is None]
    return {
        "factor": factor,
        "round": one.round,
        "offered_per_s": len(samples) / one.duration_s,
        "finished_per_s": len(finished) / one.duration_s,
        "goodput_per_s": goodput([one], slo),
        "late": sum(sample.ttft_s is not None and sample.ttft_s > slo.ttft_s[CLASS] for sample in finished),
        "answers": dict(Counter(sample.error or "finished" for sample in samples)),
        "ttft_s": None if ttft is None else ttft.percentiles,
        "itl_s": None if itl is None else itl.percentiles,
        "num_refusals": len(refusals),
        "refusal_s": dict(zip(("p50", "p99", "max"), map(float, np.percentile(refusals, (50, 99, 100))), strict=True))
        if refusals
        else None,
        "generator": asdict(one.generator),
    }


def print_row(row: dict[str, Any]) -> None:
    ttft, itl, refusal = row["ttft_s"] or {50: 0, 99: 0}, row["itl_s"] or {50: 0, 95: 0}, row["refusal_s"]
    refusals = "none"
    if refusal is not None:
        refusals = " / ".join(f"{refusal[name] * 1e3:.1f}" for name in ("p50", "p99", "max"))
    print(
        f"{row['factor']:>4g} x  offered {row['offered_per_s']:.2f}  finished {row['finished_per_s']:.2f}  "
        f"good {row['goodput_per_s']:.2f} per s  TTFT p50 {ttft[50]:.2f} p99 {ttft[99]:.2f} s  "
        f"ITL p50 {itl[50] * 1e3:.0f} p95 {itl[95] * 1e3:.0f} ms  refusals p50 / p99 / max {refusals} ms  "
        f"{row['answers']}  others used {row['cores']['others']:.2f} cores  "
        f"lag p99 {row['generator']['lag_s']['p99'] * 1e3:.0f} ms",
        flush=True,
    )


def admission_metrics(port: int) -> dict[str, float]:
    """What admission says of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    names = ("kvrelay_refusals", "kvrelay_estimated", "kvrelay_prefill_speed", "kvrelay_requests_total")
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line.startswith(names))}


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Goodput by load over all rounds, that of the highest load over the best one, and the slowest refusal."""
    by_factor: dict[float, list[float]] = {}
    for row in rows:
        by_factor.setdefault(row["factor"], []).append(row["goodput_per_s"])
    means = {factor: float(np.mean(values)) for factor, values in by_factor.items()}
    best = max(means.values())
    slowest_s = max((row["refusal_s"]["max"] for row in rows if row["refusal_s"] is not None), default=0.0)
    ratio = means[max(means)] / best if best else 0.0
    return {
        "goodput_per_s": means,
        "highest_over_best": ratio,
        "slowest_refusal_s": slowest_s,
        "holds": ratio >= MIN_GOODPUT_RATIO and slowest_s <= MAX_REFUSAL_S,
    }


def main() -> int:
    """Measure; see the module for what comes back."""
    parser = argparse.ArgumentParser(prog="make bench-overload ARGS=...")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--factors", default="0.5,1,1.5,2,3", help="of the capacity")
    parser.add_argument("--warmup", type=float, help="seconds of each load that do not count")
    parser.add_argument("--duration", type=float, help="seconds of each load that do")
    parser.add_argument("--port", type=int, default=8013)
    parser.add_argument("--results", type=Path, default=FOLDER.path, help="for samples.json")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="more arguments of the application")
    options = parser.parse_args()
    times = {"warmup_s": options.warmup, "duration_s": options.duration}
    changes = {name: value for name, value in times.items() if value is not None}
    scenario = load_scenario(str(HERE / "overload.yaml"), changes)
    factors = [float(factor) for factor in options.factors.split(",")]
    rows: list[dict[str, Any]] = []
    runs: list[Run] = []
    with serving(FOLDER, options.port, [LETS_EVERYBODY_IN, *options.arguments]):
        before, begun_s = CpuUse.read(FOLDER), time.monotonic()
        slo, capacity = find_slo(scenario, options.port), find_capacity(scenario, options.port)
        others = CpuUse.read(FOLDER).cores_since(before, time.monotonic() - begun_s)["others"]
    ttft_s = slo.ttft_s[CLASS]
    print(
        f"capacity {capacity:.2f} requests/s; SLO: TTFT {ttft_s:.1f} s, ITL {slo.itl_s * 1e3:.0f} ms; others used "
        f"{others:.2f} cores",
        flush=True,
    )
    about = describe(
        slo=asdict(slo), capacity_per_s=capacity, capacity_others_cores=others, arguments=options.arguments
    )
    with serving(FOLDER, options.port, [f"ingress.max_ttft_s={ttft_s:.2f}", *options.arguments]):
        for round_ in range(options.rounds):
            # Back and forth, so that what the machine does meanwhile falls on no load alone.
            for factor in factors[:: -1 if round_ % 2 else 1]:
                before, begun_s = CpuUse.read(FOLDER), time.monotonic()
                runs.append(run(scenario, options.port, MODEL, "disaggregated", round_, factor * capacity))
                cores = CpuUse.read(FOLDER).cores_since(before, time.monotonic() - begun_s)
                rows.append(summarise(runs[-1], slo, factor) | {"cores": cores})
                print_row(rows[-1])
                options.results.mkdir(parents=True, exist_ok=True)
                write_runs(options.results / "samples.json", runs, about)
        metrics = admission_metrics(options.port)
    problems = [problem for row in rows for problem in row["generator"]["problems"]]
    busiest = max(others, *(row["cores"]["others"] for row in rows))
    if busiest > MAX_OTHERS_CORES:
        problems.append(f"other processes used up to {busiest:.2f} cores, allowed {MAX_OTHERS_CORES:g}")
    verdict = judge(rows) | {"problems": problems}
    print(
        f"goodput at {max(verdict['goodput_per_s']):g} x is {verdict['highest_over_best']:.0%} of the best; "
        f"the slowest refusal took {verdict['slowest_refusal_s'] * 1e3:.1f} ms"
    )
    print(json.dumps({"about": about, "rows": rows, "verdict": verdict, "metrics": metrics}))
    if problems:
        print(f"no verdict: {'; '.join(problems)}", file=sys.stderr)
        return 2
    return 0 if verdict["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
