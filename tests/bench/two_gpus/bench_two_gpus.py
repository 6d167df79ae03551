"""The service on two GPUs or more: tokens, interference, and what a killed engine leaves behind.

Run: `make bench-two-gpus`. Writes a model of the shape of Llama-3.1-8B with random weights, once, and brings the graph
up on it as `make serve` does, with two engines that have a GPU each: as one prefill and one decode engine, or as two
colocated ones at several token budgets. Each turn generates the same greedy tokens, then serves `mixed.yaml` beside
this file; the last one of the disaggregated side kills engines. Prints a table and, as its last line, one JSON object.
`--gpus 4` has twice the engines of each kind, and twice the load. `--shape tiny` tries all of it on two CPU cores.
`--timeline` has the engines record their steps (`timeline.py`) and prints what gaps between tokens are made of.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from load_tests.measure import IDLE_REQUESTS, Idle, choose_slo, summarise_idle
from load_tests.samples import Run, write_runs
from load_tests.scenario import Scenario, load_scenario
from load_tests.schedule import build_idle_schedule
from load_tests.stats import Slo, attainment, class_stats, goodput, goodput_ratio, itl_ratio
from tests.bench.player import play, run
from tests.bench.two_gpus.model import config_of, write_model
from tests.bench.two_gpus.recorded import APP as RECORDED
from tests.bench.two_gpus.recorded import FOLDER as TIMELINES
from tests.bench.two_gpus.timeline import FLUSH_S, STEPS
from tests.bench.two_gpus.timeline_table import table_of
from tests.bench.two_gpus.turns import (
    FOLDER,
    PORT,
    PROBE_TOKENS,
    RESTART_TIMEOUT_S,
    SPLIT,
    Service,
    Turn,
    handoff_figures,
    serving_turn,
)
from tests.engine_pair import random_prompt

# A block of the last token, one full, one more, and several steps.
PROBES = (1, 100, 255, 256, 257, 1000, 3000, 8000, 12000)
# Long enough that its hand-off is under way when an engine is killed, half-way through the prompt.
KILLED_TOKENS = 12000
# Prompts of that length of which nobody is killed.
COMPANY = (10, 11, 12, 13)


def keep_timelines(turn: Turn, results: Path) -> None:
    """Copy what the engines have recorded to the results, and print what gaps are made of."""
    time.sleep(2 * FLUSH_S)
    kept = []
    for path in sorted(TIMELINES.iterdir()):
        kept.append(results / f"{turn.name.replace(', ', '-')}-{path.name}")
        shutil.copy(path, kept[-1])
        path.unlink()
    for path in kept:
        if path.suffix == STEPS:
            print("\n".join(table_of(path)), flush=True)


def probe(service: Service, vocab_size: int) -> list[list[int]]:
    """Greedy tokens of one prompt after the other."""
    return [service.tokens(random_prompt(length, seed=length, vocab_size=vocab_size)) for length in PROBES]


def measure_idle(scenario: Scenario, service: Service) -> Idle:
    schedule = build_idle_schedule(scenario, "idle", IDLE_REQUESTS + 1)
    samples = play(schedule, PORT, service.model, end_s=60.0, drain_s=30.0)
    return summarise_idle(samples, scenario.class_names(), f"port {PORT}")


def killed_prompt(number: int, vocab_size: int) -> tuple[int, ...]:
    """One that nobody has computed before."""
    return random_prompt(KILLED_TOKENS, KILLED_TOKENS + 1 + number, vocab_size)


def kill_amid_transfer(service: Service, vocab_size: int, expected: dict[int, list[int]]) -> dict[str, Any]:
    """Kill the prefill engine amid a hand-off, later the decode engine; what others get meanwhile and afterwards.

    Raises:
        RuntimeError: the service did not come back.
    """
    prompts = [killed_prompt(seed, vocab_size) for seed in range(4)]
    short = random_prompt(100, seed=100, vocab_size=vocab_size)
    found: dict[str, Any] = {}
    begun = time.monotonic()
    victim = service.prefill_pid(prompts[1])
    half_s = (time.monotonic() - begun) / 2
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(service.tokens, short, 512)
        long = pool.submit(service.tokens, prompts[0])
        time.sleep(half_s)
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()
        found["was under way"] = not long.done()
        found["tokens"] = long.result()
        found["answered after, s"] = time.monotonic() - killed_s
        found["other stream finished"] = other.result()[:PROBE_TOKENS] == expected[100]
    found["prefill is back after, s"] = _await(lambda: len(service.engine_pids()) == 2 and _is_healthy(), killed_s)
    found["then equal"] = service.tokens(random_prompt(8000, 8000, vocab_size)) == expected[8000]
    survivor = service.prefill_pid(prompts[2])
    (victim,) = set(service.engine_pids()) - {survivor}
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(service.tokens, prompts[3])
        time.sleep(half_s)
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()
        found["was under way again"] = not lost.done()
        found["request of the killed decode engine"] = repr(lost.exception() or "finished")[:200]
    found["decode is back after, s"] = _await(lambda: len(service.engine_pids()) == 2 and _is_healthy(), killed_s)
    found["prefill survived"] = survivor in service.engine_pids()
    found["then equal again"] = service.tokens(random_prompt(3000, 3000, vocab_size)) == expected[3000]
    return found


def tokens_in_company(service: Service, vocab_size: int) -> list[list[int]]:
    """Greedy tokens of long prompts while both engines have streams of others in the same steps."""
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(service.tokens, random_prompt(100, 200 + i, vocab_size), 2000) for i in range(4)]
        time.sleep(1.0)
        found = [service.tokens(killed_prompt(number, vocab_size)) for number in COMPANY]
        assert not any(stream.done() for stream in streams), "the streams ended before the prompts"
    return found


def _first_difference(one: list[int], other: list[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def _is_healthy() -> bool:
    server = FOLDER.server()
    return server is not None and server.is_healthy()


def _await(condition: Callable[[], bool], since_s: float) -> float:
    """Seconds from `since_s` until it holds."""
    while not condition():
        if time.monotonic() - since_s > RESTART_TIMEOUT_S:
            raise RuntimeError(f"the service did not come back within {RESTART_TIMEOUT_S:g} s")
        time.sleep(0.5)
    return time.monotonic() - since_s


def print_row(one: Run, slo: Slo) -> None:
    for kind in one.classes():
        stats = class_stats([one], kind)
        assert stats.ttft is not None and stats.itl is not None, f"{kind}: no request finished"
        ttft, itl = stats.ttft.percentiles, stats.itl.percentiles
        print(
            f"{one.deployment:>22} {kind:>5} {stats.ttft.n:>4} requests  TTFT p50 {ttft[50]:.3f} p99 {ttft[99]:.3f} s  "
            f"ITL p50 {itl[50] * 1e3:.1f} p95 {itl[95] * 1e3:.1f} p99 {itl[99] * 1e3:.1f} ms  "
            f"{attainment([one], slo, kind) or 0:.0%} good  errors {sum(stats.errors.values())}  "
            f"{'; '.join(one.generator.problems)}",
            flush=True,
        )


def compare_with_split(runs: list[Run], slo: Slo) -> dict[str, Any]:
    """Ratios of each colocated deployment to the disaggregated one, over the rounds that both have."""
    split = {one.round: one for one in runs if one.deployment == SPLIT}
    found = {}
    for name in dict.fromkeys(one.deployment for one in runs if not one.deployment.startswith(SPLIT)):
        own = [one for one in runs if one.deployment == name and one.round in split]
        pair = [split[one.round] for one in own]
        if own:
            found[name] = {
                "p99_itl_ratio": asdict(itl_ratio(own, pair, "chat")),
                "goodput_ratio": asdict(goodput_ratio(pair, own, slo)),
                "goodput": goodput(own, slo),
                "split_goodput": goodput(pair, slo),
            }
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program where it asks for what cannot be."""
    parser = argparse.ArgumentParser(prog="make bench-two-gpus ARGS=...")
    parser.add_argument("--turns", default="disaggregated;colocated, 512;colocated, 2048;colocated, 8192")
    parser.add_argument("--gpus", type=int, default=2, help="engines, a GPU for each; the load grows with them")
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--steps", type=int, default=2048, help="token budget of the prefill engine")
    parser.add_argument("--scenario", default=str(Path(__file__).with_name("mixed.yaml")))
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of all turns besides")
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder of the model; default: .run/two-gpus/SHAPE")
    parser.add_argument("--kill", action="store_true", help="kill engines at the end of the first turn")
    parser.add_argument("--timeline", action="store_true", help="record every step; files go to the results")
    parser.add_argument("--results", type=Path, default=FOLDER.path, help="for samples.json")
    options = parser.parse_args(arguments)
    if options.gpus < 2 or options.gpus % 2:
        parser.error(f"--gpus {options.gpus}: an even number is needed, half of it for each pool")
    if 1 < (found := torch.cuda.device_count()) < options.gpus:  # one GPU, or none, is shared
        parser.error(f"--gpus {options.gpus}: this machine has {found}")
    if options.kill and options.gpus > 2:
        parser.error(f"--kill with --gpus {options.gpus}: of two engines alone it is known which one works on a prompt")
    return options


def main() -> int:
    """0 when every token was equal and the kills came when they should and cost nothing else."""
    options, num_gpus = parse(), torch.cuda.device_count()
    scenario = load_scenario(options.scenario)
    folder = options.model or FOLDER.path / options.shape
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, options.shape)
    common = ["engine.max_num_seqs=64", "engine.max_model_len=16384", *options.set]
    common += ["prefill.num_gpus=1", "decode.num_gpus=1"] if num_gpus > 1 else ["engine.kv_cache_bytes=500000000"]
    vocab_size = config_of(options.shape).vocab_size
    runs: list[Run] = []
    idle: dict[str, Idle] = {}
    tokens: dict[str, list[list[int]]] = {}
    result: dict[str, Any] = {"num_gpus": num_gpus, "num_engines": options.gpus, "handoff": {}, "started_s": {}}
    for number, name in enumerate(options.turns.split(";")):
        turn = Turn(name.strip(), options.gpus)
        begun = time.monotonic()
        arguments = [one for one in common if turn.is_split or not one.startswith("prefill.")]
        app = RECORDED if options.timeline else "app:graph"
        with serving_turn(turn, folder.resolve(), arguments, options.steps, app) as service:
            result["started_s"][turn.name] = time.monotonic() - begun
            tokens[turn.name] = probe(service, vocab_size)
            idle[turn.name] = measure_idle(scenario, service)
            print(f"{turn.name}: up after {result['started_s'][turn.name]:.0f} s, idle {idle[turn.name]}", flush=True)
            if "killed" in result:
                expected_tokens = service.tokens(killed_prompt(0, vocab_size))
                same = _first_difference(expected_tokens, result["killed"]["tokens"])
                company = map(_first_difference, tokens_in_company(service, vocab_size), result["undisturbed"])
                # No failure: what an answer is generated beside changes its rounding, and so do these.
                result[f"killed, {turn.name}"] = same
                result[f"in company, {turn.name}"] = list(company)
                print(f"request whose prefill engine was killed, first token that differs from {turn.name}: {same}")
                print(f"other prompts of its length, in company and not: {result[f'in company, {turn.name}']}")
            runs.append(run(scenario, PORT, service.model, turn.name, options.round, load=options.gpus / 2))
            slo = choose_slo(scenario.slo, list(idle.values()))
            print_row(runs[-1], slo)
            options.results.mkdir(parents=True, exist_ok=True)
            if options.timeline:
                keep_timelines(turn, options.results)
            write_runs(options.results / "samples.json", runs, {"idle": {k: asdict(v) for k, v in idle.items()}})
            if turn.is_split:
                result["handoff"][turn.name] = handoff_figures()
            if options.kill and number == 0:
                expected = dict(zip(PROBES, tokens[turn.name], strict=True))
                result["undisturbed"] = [service.tokens(killed_prompt(number, vocab_size)) for number in COMPANY]
                result["killed"] = kill_amid_transfer(service, vocab_size, expected)
                print(json.dumps(result["killed"], indent=1), flush=True)
    names = list(tokens)
    equal = {name: [a == b for a, b in zip(tokens[names[0]], tokens[name], strict=True)] for name in names}
    result |= {"equal": equal, "slo": asdict(slo), "ratios": compare_with_split(runs, slo)}
    result["idle"] = {name: asdict(one) for name, one in idle.items()}
    result["goodput"] = {one.deployment: goodput([one], slo) for one in runs}
    for name, found in equal.items():
        print(f"{name}: tokens of {sum(found)} of {len(found)} prompts as {names[0]}")
    print(json.dumps(result))
    survived = all(value for value in result.get("killed", {}).values() if isinstance(value, bool))
    return 0 if survived and all(all(found) for found in equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
