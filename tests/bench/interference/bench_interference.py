"""Colocated against disaggregated at equal resources: two engines, a core each, the same model and the same arrivals.

Run: `make bench-interference`, with the load generator's Python. Three questions: how far long prompts hold up chat
streams (`mixed`, every budget of chunked prefill), which side serves more requests within the SLO (`mixed-open`, both
sides tuned, load swept), and whether short uniform prompts are better left colocated (`chat`). Deployments take turns
within each round. Writes a report for each into `load_tests/results/`, prints the tables and, as its last line, one
JSON object.
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from load_tests.compare import Plan, compare
from load_tests.deployments import Deployment, Deployments
from load_tests.environment import describe
from load_tests.measure import choose_slo
from load_tests.report import table, write_report
from load_tests.run import RESULTS, result_folder
from load_tests.samples import Run, write_runs
from load_tests.scenario import load_scenario
from load_tests.stats import Ratio, Slo, attainment, class_stats, goodput, goodput_ratio, itl_ratio
from load_tests.verdict import decide, same_rounds

URL = "http://127.0.0.1:8011"
SERVER = ".venv/bin/python -m tests.bench.interference.pinned"
SPLIT = "disaggregated"
WHOLE = "colocated, whole prompts"
# Tokens of a step in which decodes and prompts share; 128 is the engine's default on one thread.
BUDGETS = (16, 32, 64, 128)
DEFAULT_BUDGET = 128
# The decode engine computes chat prompts itself, a few tokens beside each step, so that they do not lengthen it much;
# the prefill engine takes longer steps, which nobody waits for: fewer chunks to hand over.
SPLIT_ARGUMENTS = (
    "engine.max_num_seqs=16 decode.engine.max_num_batched_tokens=16 prefill.engine.max_num_batched_tokens=256 "
    "min_remote_prefill_tokens=256"
)
COLOCATED_ARGUMENTS = "mode=colocated decode.min_replicas=2 decode.max_replicas=2 engine.max_num_seqs=16"


def server_versions() -> dict[str, str]:
    """Versions of what the server stands on; it lives in another environment than the load generator."""
    names = ("torch", "transformers", "ray", "numba")
    program = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    ran = subprocess.run([".venv/bin/python", "-c", program], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(ran.stdout)
    return versions


def colocated(budget: int) -> str:
    """Name of the colocated deployment with a token budget."""
    return f"colocated, {budget}"


def build(names: list[str]) -> Deployments:
    """Describe how to bring up each of the named deployments."""
    budgets = {colocated(budget): budget for budget in BUDGETS} | {WHOLE: 2048}
    found = {}
    for name in names:
        if name == SPLIT:
            arguments, num_prefill, num_decode = SPLIT_ARGUMENTS, 1, 1
        else:
            arguments = f"{COLOCATED_ARGUMENTS} engine.max_num_batched_tokens={budgets[name]}"
            num_prefill, num_decode = 0, 2
        start = f"{SERVER} up {arguments}"
        found[name] = Deployment(num_prefill=num_prefill, num_decode=num_decode, start=start, stop=f"{SERVER} down")
    return Deployments(url=URL, deployments=found)


class Bench:
    """One question: a scenario, the deployments, the loads."""

    def __init__(self, scenario: str, names: list[str], loads: list[float], rounds: int) -> None:
        self.scenario = load_scenario(scenario)
        self.deployments = build(names)
        self.folder = result_folder(RESULTS, f"interference-{scenario}")
        print(f"\n{scenario}: {', '.join(names)}; loads {loads}; {rounds} rounds", flush=True)
        # Colocated deployments differ in nothing while they are idle.
        plan = Plan(self.scenario, self.deployments, loads, range(rounds), idle=[SPLIT, colocated(DEFAULT_BUDGET)])
        found = compare(plan, self.folder, lambda line: print(line, flush=True))
        self.runs: list[Run] = found.runs
        self.idle = found.idle
        self.slo = choose_slo(self.scenario.slo, list(found.idle.values()))

    def of(self, name: str, load: float | None = None) -> list[Run]:
        """Valid runs of a deployment, at one load or at all."""
        return [run for run in self.runs if run.deployment == name and load in (None, run.load) and run.is_valid]

    def decide(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The verdict and its sentences; None where too few runs were valid, with the reason."""
        try:
            verdict = decide(self.runs, self.deployments.deployments, self.slo)
        except ValueError as error:
            return None, [f"No answer: {error}."]
        return asdict(verdict), list(verdict.sentences)

    def report(self, title: str, findings: list[str]) -> str:
        """Write the report and the raw samples, print the table."""
        about = describe(
            server_versions=server_versions(),
            scenario=self.scenario.model_dump(mode="json"),
            deployments=self.deployments.model_dump(mode="json"),
            idle={name: asdict(idle) for name, idle in self.idle.items()},
        )
        write_runs(self.folder / "samples.json", self.runs, about)
        page = write_report(self.folder, title, self.runs, self.slo, about, findings)
        print(table(self.runs, self.slo))
        print("\n".join(findings))
        print(f"report: {page}", flush=True)
        return str(page)


def in_words(ratio: Ratio) -> str:
    """A ratio for a sentence."""
    return f"{ratio.value:.2f} times (95% interval {ratio.low:.2f} to {ratio.high:.2f})"


def best_budgets(bench: Bench) -> dict[str, int]:
    """Choose budgets as an operator would; none without a valid run.

    By two rules, since none is best at all: the most requests within the SLO, and the shortest p99 ITL of chat among
    those that keep the TTFT SLO for the median request of every class. A small budget evens the steps out and makes
    long prompts wait.
    """
    measured = [budget for budget in BUDGETS if bench.of(colocated(budget))]
    prompt = [budget for budget in measured if keeps_ttft(bench, colocated(budget))]
    p99s = {budget: p99_itl(bench, colocated(budget)) for budget in measured}
    rules = {
        "goodput": max(measured, key=lambda b: (goodput(bench.of(colocated(b)), bench.slo), -p99s[b]), default=None),
        "p99 ITL within the TTFT SLO": min(prompt, key=lambda b: p99s[b], default=None),
    }
    return {rule: budget for rule, budget in rules.items() if budget is not None}


def p99_itl(bench: Bench, name: str) -> float:
    """Seconds; of chat."""
    itl = class_stats(bench.of(name), "chat").itl
    return itl.percentiles[99] if itl else math.inf


def keeps_ttft(bench: Bench, name: str) -> bool:
    """Whether the median TTFT of every class is within the SLO."""
    found = {kind: class_stats(bench.of(name), kind).ttft for kind in bench.scenario.class_names()}
    return all(ttft is not None and ttft.percentiles[50] <= bench.slo.ttft_s[kind] for kind, ttft in found.items())


def ask_mixed(budgets: list[int], rounds: int) -> dict[str, Any]:
    """How far do long prompts hold up chat streams, at some budgets, or at every one and with whole prompts?"""
    names = [SPLIT, *map(colocated, budgets or BUDGETS), *([] if budgets else [WHOLE])]
    bench = Bench("mixed", names, [1.0], rounds)
    best = best_budgets(bench)
    rows: dict[str, Any] = {}
    findings = []
    for name in names[1:]:
        try:
            ratio = itl_ratio(*same_rounds(bench.of(name), bench.of(SPLIT)), "chat")
        except ValueError as error:
            findings.append(f"{name} over {SPLIT}: no answer: {error}.")
            continue
        rows[name] = {"p99_itl_ratio": asdict(ratio), "goodput": goodput(bench.of(name), bench.slo)}
        rules = [rule for rule, budget in best.items() if name == colocated(budget)]
        label = f" (best budget by {' and by '.join(rules)})" if rules else ""
        findings.append(
            f"{name}{label} over {SPLIT}: p99 ITL of chat {in_words(ratio)}; goodput {rows[name]['goodput']:.3f} "
            f"requests/s."
        )
    page = bench.report("Mixed: chat streams while long prompts arrive", findings)
    return {
        "slo": asdict(bench.slo),
        "idle": {name: asdict(idle) for name, idle in bench.idle.items()},
        "best_budgets": best,
        "split_goodput": goodput(bench.of(SPLIT), bench.slo) if bench.of(SPLIT) else None,
        "colocated": rows,
        "goodput": goodput_by_criterion(bench, [1.0]),
        "runs": figures(bench),
        "report": page,
    }


def ask_goodput(budgets: list[int], loads: list[float], rounds: int) -> dict[str, Any]:
    """Which side serves more requests within the SLO?"""
    bench = Bench("mixed-open", [SPLIT, *map(colocated, budgets)], loads, rounds)
    verdict, sentences = bench.decide()
    page = bench.report("Goodput on mixed traffic", sentences)
    return {
        "slo": asdict(bench.slo),
        "verdict": verdict,
        "goodput": goodput_by_criterion(bench, loads),
        "runs": figures(bench),
        "report": page,
    }


def ask_chat(rounds: int) -> dict[str, Any]:
    """Are short uniform prompts better left colocated?"""
    bench = Bench("chat", [SPLIT, colocated(DEFAULT_BUDGET)], [1.0], rounds)
    verdict, sentences = bench.decide()
    page = bench.report("Chat: short uniform prompts", sentences)
    return {
        "slo": asdict(bench.slo),
        "verdict": verdict,
        "goodput": goodput_by_criterion(bench, [1.0]),
        "runs": figures(bench),
        "report": page,
    }


def goodput_by_criterion(bench: Bench, loads: list[float]) -> list[dict[str, Any]]:
    """Goodput of every deployment and load with looser and stricter ITL SLOs than the one of the verdict.

    Half as much again and twice the bound; on 95% and 99% of a request's gaps, and on their mean, which hides stalls.
    """
    return [
        goodput_of(bench, name, load, replace(bench.slo, itl_s=times * bench.slo.itl_s, itl_quantile=quantile))
        for times in (1.0, 1.5, 2.0)
        for quantile in (0.95, 0.99, None)
        for load in loads
        for name in bench.deployments.deployments
    ]


def goodput_of(bench: Bench, name: str, load: float, slo: Slo) -> dict[str, Any]:
    """Goodput of one deployment at one load, which share of each class keeps the SLO, and the split one's over it."""
    runs = bench.of(name, load)
    row: dict[str, Any] = {"itl_s": slo.itl_s, "itl_quantile": slo.itl_quantile, "load": load, "deployment": name}
    row["attainment"] = {kind: attainment(runs, slo, kind) for kind in bench.scenario.class_names()}
    row["goodput"] = goodput(runs, slo) if runs else None
    common = {run.round for run in runs} & {run.round for run in bench.of(SPLIT, load)}
    if name != SPLIT and common:
        row["split_over_this"] = asdict(goodput_ratio(*same_rounds(bench.of(SPLIT, load), runs), slo))
    return row


def figures(bench: Bench) -> list[dict[str, Any]]:
    """Figures of every class in every run; the requests themselves are in the report's `samples.json`."""
    return [
        {
            "deployment": run.deployment,
            "load": run.load,
            "round": run.round,
            "goodput": goodput([run], bench.slo),
            "generator": asdict(run.generator),
            "classes": [asdict(class_stats([run], kind)) for kind in bench.scenario.class_names()],
        }
        for run in bench.runs
    ]


def main() -> int:
    """Ask the questions; 2 when some run stayed invalid."""
    parser = argparse.ArgumentParser(prog="make bench-interference ARGS=...")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", default="0.5,0.75,1", help="of the goodput sweep")
    parser.add_argument("--only", choices=("mixed", "goodput", "chat"), help="ask one question")
    parser.add_argument("--budgets", default="", help="to measure; else all, and in the sweep the best ones of `mixed`")
    options = parser.parse_args()
    answers: dict[str, Any] = {}
    given = [int(budget) for budget in options.budgets.split(",") if budget]
    if options.only in (None, "mixed"):
        answers["mixed"] = ask_mixed(given, options.rounds)
    if options.only in (None, "goodput"):
        best = dict.fromkeys(answers.get("mixed", {}).get("best_budgets", {}).values())
        budgets = given or [*best] or [DEFAULT_BUDGET]
        loads = [float(load) for load in options.loads.split(",")]
        answers["goodput"] = ask_goodput(budgets, loads, options.rounds)
    if options.only in (None, "chat"):
        answers["chat"] = ask_chat(options.rounds)
    print(json.dumps(answers))
    runs = [run for answer in answers.values() for run in answer["runs"]]
    return 2 if any(run["generator"]["problems"] for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
