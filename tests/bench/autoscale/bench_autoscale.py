"""Two pools that scale on nodes that come and go: Ray's autoscaler, the planner, and engines with a realistic pace.

Run: `make bench-autoscale`, on a machine that does nothing else. Starts a cluster on this machine (`cluster.py`), with
a type of nodes for each pool, and the graph with modelled engines (`modelled.py`), one of each pool at first. Requests
arrive at random and steadily; for a while their prompts are five times as long, then their answers ten times. Longer
prompts are to start nodes for prefill alone, longer answers nodes for decode alone, and all of them are to go again.
Prints tables, draws `.run/autoscale/autoscale.png` and prints, as its last line, one JSON object. Exit status 0 only if
all that was so and no request was lost.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from ray import serve

from app.config import AppConfig
from app.local import parse_arguments
from app.ports import HOST
from load_tests.environment import describe
from load_tests.samples import Sample
from load_tests.schedule import Planned
from tests.bench.autoscale.cluster import POOLS, NodeTypes, autoscaling_cluster, engine_resource
from tests.bench.autoscale.graphs import graph
from tests.bench.autoscale.modelled import CURVES
from tests.bench.autoscale.plots import save_plot
from tests.bench.autoscale.verdict import Phase, Reaction, problems, react, steps_of
from tests.bench.autoscale.watch import Moment, Watch
from tests.bench.player import play
from tests.bench.progress import timed

FOLDER = Path(".run/autoscale")
PORT = 8017
MODEL = "modelled"
LEAST, MOST = 1, 3
# Of a request where there is little to do: one engine of each pool has less than half of what it can. Ids of words.
RATE, PROMPT_TOKENS, OUTPUT_TOKENS = 1.5, 140, 12
# At first traffic grows by so much per second: until answers have ended the planner takes them to be long.
FIRST_RATE, GROWTH = 0.15, 0.04
_SPREAD = 0.25
_TOKEN_IDS = range(1000, 40_000)
# What of them grows in a step.
TIMES_PROMPTS, TIMES_ANSWERS = 5.0, 10.0
NODES = NodeTypes(max_nodes=MOST, idle_s=15.0)
# All prompts go to the prefill pool, so that each step is one pool's alone; nobody is refused, however late.
ARGUMENTS = [
    f"served_model_name={MODEL}",
    "min_remote_prefill_tokens=16",
    "ingress.max_ttft_s=600",
    "engine.num_blocks=8192",
    "engine.block_size=16",
    "engine.max_num_batched_tokens=1024",
    "planner.enabled=true",
    "planner.ttft_s=2",
    # Seats are short long before gaps are: the pace of modelled engines suffers while others start beside them. And
    # there are enough for the prompts that wait, which have a seat each.
    "planner.itl_s=0.2",
    "decode.engine.max_num_seqs=16",
    "planner.hold_s=20",
    "planner.start_s=20",
]


def arguments(given: Sequence[str]) -> AppConfig:
    """Of the graph."""
    pools = [
        pair
        for pool in POOLS
        for pair in (
            f"{pool}.min_replicas={LEAST}",
            f"{pool}.max_replicas={MOST}",
            f"{pool}.num_gpus=1",
            f"{pool}.resources.{engine_resource(pool)}=1",
        )
    ]
    return parse_arguments([*ARGUMENTS, *pools, *given])


def build_load(phases: Sequence[Phase], seed: int) -> Iterator[Planned]:
    """Requests at random instants, the first ones evenly and slowly, with lengths about those of their phase."""
    rng = random.Random(seed)
    ends_s = list(accumulate(phase.seconds for phase in phases))
    at_s = 0.0
    while at_s < ends_s[-1]:
        phase = next(phase for phase, end_s in zip(phases, ends_s, strict=True) if at_s < end_s)

        def draw(tokens: float) -> int:
            return round(tokens * rng.uniform(1 - _SPREAD, 1 + _SPREAD))

        prompt = tuple(rng.choices(_TOKEN_IDS, k=draw(PROMPT_TOKENS * phase.prompts)))
        yield Planned(phase.name, f"{at_s:.3f}", 0, at_s, 0.0, prompt, draw(OUTPUT_TOKENS * phase.answers))
        rate = FIRST_RATE * math.exp(GROWTH * at_s)
        at_s += 1 / rate if rate < RATE else rng.expovariate(RATE)


def measure(config: AppConfig, phases: Sequence[Phase], port: int, seed: int) -> tuple[list[Moment], list[Sample]]:
    """Bring the graph up, play the load, and note what there is meanwhile."""
    with autoscaling_cluster(NODES, FOLDER / "head.log") as logs:
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": port})
            serve.run(graph(config))
            print("both pools serve; the load begins", flush=True)
            seconds = sum(phase.seconds for phase in phases)
            with Watch() as watch, timed("load", seconds):
                samples = play(list(build_load(phases, seed)), port, MODEL, seconds, drain_s=60.0)
        finally:
            for log in logs.glob("serve/controller_*.log"):  # with the planner's reasons
                shutil.copy(log, FOLDER / "controller.log")
    return watch.moments, list(samples)


def print_row(*cells: object) -> None:
    """Of a table."""
    print("".join(f"{_text(cell):>14}" for cell in cells))


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f} s"
    return "never" if cell is None else str(cell)


def print_tables(reactions: Sequence[Reaction], rows: Sequence[dict[str, float | str]]) -> None:
    """How each step was followed, and what requests saw of it."""
    print(
        "\nFrom a step's beginning until more were wanted, there, served; from its end until no more were than before:"
    )
    print_row(
        "step for", "target", "node", "replica", "replicas", "nodes", "target back", "replicas back", "nodes back"
    )
    for one in reactions:
        up = one.target_s, one.node_s, one.replica_s, one.most_replicas, one.most_nodes
        print_row(one.pool, *up, one.fewer_target_s, one.fewer_replicas_s, one.fewer_nodes_s)
    print()
    print_row(*rows[0])
    for row in rows:
        print_row(*row.values())


def summarise(samples: Sequence[Sample], phases: Sequence[Phase]) -> list[dict[str, float | str]]:
    """Of each phase: what its requests saw."""
    rows: list[dict[str, float | str]] = []
    for phase in phases:
        own = [sample for sample in samples if sample.request_class == phase.name]
        ttft_s = [sample.ttft_s for sample in own if sample.ttft_s is not None]
        gaps_s = [gap for sample in own for gap in sample.gaps_s]
        rows.append(
            {
                "phase": phase.name,
                "requests": len(own),
                "lost": sum(sample.error is not None for sample in own),
                "TTFT p50": float(np.median(ttft_s)) if ttft_s else 0.0,
                "TTFT p95": float(np.quantile(ttft_s, 0.95)) if ttft_s else 0.0,
                "gaps p95": float(np.quantile(gaps_s, 0.95)) if gaps_s else 0.0,
            }
        )
    return rows


def main() -> int:
    """Measure; see the module for what comes back."""
    parser = argparse.ArgumentParser(prog="make bench-autoscale ARGS=...")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warmup", type=float, default=70.0, help="seconds with little to do, before")
    parser.add_argument("--step", type=float, default=60.0, help="seconds of longer prompts, and of longer answers")
    parser.add_argument("--calm", type=float, default=300.0, help="seconds with little to do, behind")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="further arguments of the application")
    options = parser.parse_args()
    phases = [
        Phase("little", options.warmup),
        Phase("long prompts", options.step, prompts=TIMES_PROMPTS),
        Phase("long answers", options.step, answers=TIMES_ANSWERS),
        Phase("little again", options.calm),
    ]
    load_before = os.getloadavg()[0]
    config = arguments(options.arguments)
    moments, samples = measure(config, phases, options.port, options.seed)
    reactions = [react(step, moments, LEAST) for step in steps_of(phases)]
    rows = summarise(samples, phases)
    found = problems(reactions, sum(sample.error is not None for sample in samples))
    print_tables(reactions, rows)
    save_plot(moments, phases, FOLDER / "autoscale.png")
    print(f"\nplot: {FOLDER / 'autoscale.png'}; the planner's reasons: {FOLDER / 'controller.log'}")
    for problem in found:
        print(f"NOT AS ASKED: {problem}")
    about = describe(
        arguments=options.arguments,
        curves=asdict(CURVES),
        load_average=(load_before, os.getloadavg()[0]),
        phases=list(map(asdict, phases)),
    )
    counts = [asdict(moments[0])] + [asdict(now) for before, now in pairwise(moments) if is_change(before, now)]
    told = {
        "about": about,
        "reactions": list(map(asdict, reactions)),
        "phases": rows,
        "changes": counts,
        "problems": found,
    }
    print(json.dumps(told))
    return 1 if found else 0


def is_change(before: Moment, now: Moment) -> bool:
    """Whether anything but the time is another."""
    return (before.targets, before.replicas, before.nodes) != (now.targets, now.replicas, now.nodes)


if __name__ == "__main__":
    sys.exit(main())
