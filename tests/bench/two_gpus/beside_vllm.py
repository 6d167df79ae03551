r"""The service beside two vLLM engines, on the same GPUs, with the same model and the same schedules.

Run: `make bench-beside-vllm ARGS=...`, in four steps of one visit, for vLLM has another torch than this project.

    make bench-beside-vllm ARGS="plan --scenario mixed chat --trace mooncake_conversation.jsonl"
    make bench-beside-vllm ARGS="ours"
    PYTHON-WITH-VLLM tests/bench/two_gpus/vllm_engine.py .run/beside-vllm/*.play.json \
        --model .run/two-gpus/llama-8b --out .run/beside-vllm/vllm.json
    make bench-beside-vllm ARGS="table"

`plan` writes the model (random weights) and what is sent; `ours` serves it, split and colocated, over HTTP; `table`
prints what came of all, and one JSON object as its last line. vLLM's engines are asked without HTTP.
With `--gpus 1` behind `plan` and `ours`, and `--num-gpus 1` for vLLM, one colocated engine is compared with one of
vLLM's under half of the load. `--shape tiny` tries `plan` and `ours` on two CPU cores.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from load_tests.convert import clip, convert_mooncake, window
from load_tests.generator import judge
from load_tests.samples import Run, read_runs, write_runs
from load_tests.scenario import Scenario, TraceReplay, load_scenario
from load_tests.trace import write_trace
from tests.bench.player import play
from tests.bench.two_gpus.comparison import figures_of, lines, ratios, scenarios, tail_intervals
from tests.bench.two_gpus.model import write_model
from tests.bench.two_gpus.plays import IDLE, Play, plays_of, read_play, write_play
from tests.bench.two_gpus.turns import PORT, SPLIT, Turn, handoff_figures, serving_turn

FOLDER = Path(".run/beside-vllm")
MODELS = Path(".run/two-gpus")
COLOCATED = "colocated, 2048"
OURS, THEIRS, ENDING = "ours.json", "vllm.json", ".play.json"
MAX_MODEL_LEN = 16384
# Of the trace: what fits into the engines, at a rate that two GPUs keep up with.
TRACE_PROMPT, TRACE_OUTPUT = 12_000, 500


def trace_scenario(path: Path, options: argparse.Namespace) -> Scenario:
    """A cut of a trace in Mooncake's form, as a scenario."""
    rows = window(convert_mooncake(path).rows, options.trace_start_s, options.trace_s * options.trace_speed)
    cut = options.folder / "trace.csv"
    write_trace(cut, [clip(row, TRACE_PROMPT, TRACE_OUTPUT) for row in rows])
    warmup_s = options.trace_s / 5
    return Scenario(
        name="trace",
        description=f"{path.name} from {options.trace_start_s:g} s on, {options.trace_speed:g} times as fast.",
        warmup_s=warmup_s,
        duration_s=options.trace_s - warmup_s,
        drain_s=20,
        trace=TraceReplay(path=cut, speed=options.trace_speed),
    )


def plan(options: argparse.Namespace) -> None:
    """Write the model, and a file for each play."""
    folder = MODELS / options.shape
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, options.shape)
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob(f"*{ENDING}"):
        old.unlink()
    chosen = [load_scenario(str(Path(__file__).with_name(f"{name}.yaml"))) for name in options.scenario]
    chosen += [trace_scenario(path, options) for path in options.trace]
    plays = [one for scenario in chosen for one in plays_of(scenario, options.round, options.gpus / 2)]
    for number, one in enumerate(plays):
        write_play(options.folder / f"{number}-{one.name.replace(' ', '-')}{ENDING}", one)
        print(f"{one.name}: {len(one.requests)} requests planned in {one.warmup_s + one.duration_s:g} s")


def planned(folder: Path, names: list[str]) -> list[Play]:
    """Plays of these scenarios, each behind its idle system's; all, where none is named."""
    found = [read_play(path) for path in sorted(folder.glob(f"*{ENDING}"))]
    return [one for one in found if not names or one.name.removesuffix(IDLE) in names]


def play_one(one: Play, model: str, deployment: str) -> Run:
    """Play it to the service that is up."""
    samples = play(one.requests, PORT, model, one.warmup_s + one.duration_s, one.drain_s)
    return one.run(deployment, samples, judge(samples, {}))


def ours(options: argparse.Namespace) -> None:
    """Play to the service, split and colocated; samples are written after each play, beside those of other turns."""
    plays = planned(options.folder, options.scenario)
    turns = [Turn(name.strip(), options.gpus) for name in options.turns.split(";")]
    runs, about = _written(options.folder / OURS)
    runs = [run for run in runs if run.deployment not in [turn.name for turn in turns]]
    common = ["engine.max_num_seqs=64", f"engine.max_model_len={MAX_MODEL_LEN}"]
    has_own_gpus = torch.cuda.device_count() >= options.gpus
    common += ["decode.num_gpus=1"] if has_own_gpus else ["engine.kv_cache_bytes=500000000"]
    for turn in turns:
        begun = time.monotonic()
        own = [*common, "prefill.num_gpus=1"] if turn.is_split and has_own_gpus else common
        with serving_turn(turn, (MODELS / options.shape).resolve(), own, options.steps) as service:
            about["started_s"][turn.name] = time.monotonic() - begun
            print(f"{turn.name}: up after {time.monotonic() - begun:.0f} s", flush=True)
            for one in plays:
                runs.append(play_one(one, service.model, turn.name))
                if turn.is_split:
                    about[f"handoff, {turn.name}"] = handoff_figures()
                write_runs(options.folder / OURS, runs, about)
                print(f"{turn.name}: {one.name}, {len(runs[-1].samples)} requests", flush=True)


def table(options: argparse.Namespace) -> None:
    """Print what is there, of either side."""
    (runs, about), (theirs, their_about) = _written(options.folder / OURS), _written(options.folder / THEIRS)
    started_s = about["started_s"] | their_about["started_s"]
    whole = _whole(runs + theirs)
    for name in scenarios(whole):
        print("\n".join(lines(whole, name, started_s)), flush=True)
    result = {
        name: {
            "figures": [asdict(one) for one in figures_of(whole, name)],
            "ratios": ratios(whole, name),
            "p99_itl_over_ours": tail_intervals(whole, name, next(r for r in whole if r.scenario == name).classes()[0]),
        }
        for name in scenarios(whole)
    }
    print(json.dumps({"started_s": started_s, "scenarios": result}))


def _written(path: Path) -> tuple[list[Run], dict[str, Any]]:
    return read_runs(path) if path.exists() else ([], {"started_s": {}})


def _whole(runs: list[Run]) -> list[Run]:
    """Without plays of which the idle system's is missing: whoever was killed amid them."""
    found = {(run.deployment, run.scenario) for run in runs}
    return [run for run in runs if run.scenario.endswith(IDLE) or (run.deployment, run.scenario + IDLE) in found]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What is to be done; None: as the command line says."""
    parser = argparse.ArgumentParser(prog="make bench-beside-vllm ARGS=...")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--shape", default="llama-8b")
    steps = parser.add_subparsers(required=True)
    planning = steps.add_parser("plan")
    planning.set_defaults(step=plan)
    planning.add_argument("--scenario", nargs="*", default=["mixed", "chat"], help="YAML files beside this one")
    planning.add_argument("--trace", type=Path, nargs="*", default=[], help="a trace in Mooncake's form")
    planning.add_argument("--trace-start-s", type=float, default=600.0)
    planning.add_argument("--trace-s", type=float, default=60.0, help="how long the cut is played")
    planning.add_argument("--trace-speed", type=float, default=0.5)
    planning.add_argument("--round", type=int, default=0)
    serving = steps.add_parser("ours")
    serving.set_defaults(step=ours)
    serving.add_argument("--scenario", nargs="*", default=[], help="of those planned; default: all")
    serving.add_argument("--turns", help=f"default: {SPLIT};{COLOCATED}, with --gpus 1 {COLOCATED}")
    serving.add_argument("--steps", type=int, default=2048, help="token budget of the prefill engine")
    for step in (planning, serving):
        step.add_argument("--gpus", type=int, default=2, help="engines; the load is in proportion (default: 2)")
    steps.add_parser("table").set_defaults(step=table)
    options = parser.parse_args(arguments)
    if "gpus" in options and options.gpus != 1 and (options.gpus < 1 or options.gpus % 2):
        parser.error(f"--gpus {options.gpus}: 1 or an even number")
    if options.step is ours:
        options.turns = options.turns or (COLOCATED if options.gpus == 1 else f"{SPLIT};{COLOCATED}")
        if options.gpus == 1 and SPLIT in options.turns:
            parser.error(f"--turns {options.turns!r} with --gpus 1: one engine cannot be split")
    return options


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a service that is up ends with this
    options.step(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
