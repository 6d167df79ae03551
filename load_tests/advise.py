"""Colocated or disaggregated? `python -m load_tests.advise SCENARIO --deployments FILE` measures and answers.

Brings each deployment of the file up in turn on the same hardware, finds what it does when idle, sets the SLO from
that, sweeps the load, and says which deployment serves most requests within the SLO, and how sure that is. With
`--simulator`, ratios that are far behind in the simulator are not brought up.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from load_tests.compare import Plan, compare
from load_tests.deployments import DeploymentError, Deployments, load_deployments
from load_tests.environment import describe
from load_tests.generator import GeneratorError
from load_tests.measure import Idle, ServiceError, choose_slo
from load_tests.narrow import NarrowError, narrow
from load_tests.report import table, write_report
from load_tests.run import add_scenario_arguments, changes_of, result_folder
from load_tests.samples import write_runs
from load_tests.scenario import Scenario, ScenarioError, load_scenario
from load_tests.trace import TraceError
from load_tests.verdict import decide

DEPLOYMENTS = Path(__file__).parent / "targets"


def main(arguments: list[str] | None = None) -> int:
    """Measure and answer; 0 when there is an answer, 2 when a run was invalid, 1 when it could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.advise", description="Colocated or disaggregated, and with which ratio? Measures it."
    )
    add_scenario_arguments(parser)
    parser.add_argument(
        "--deployments",
        type=Path,
        default=DEPLOYMENTS / "local.yaml",
        help="what to compare, and how to bring it up (default: %(default)s)",
    )
    parser.add_argument(
        "--loads",
        type=lambda text: [float(load) for load in text.split(",")],
        default=[0.5, 1.0, 1.5],
        help="multipliers of the scenario's arrival rates (default: 0.5,1,1.5)",
    )
    parser.add_argument(
        "--simulator", metavar="COMMAND", help="leaves out ratios that it sees far behind, where there are several"
    )
    options = parser.parse_args(arguments)
    try:
        scenario = load_scenario(options.scenario, changes_of(options))
        deployments = load_deployments(options.deployments)
        folder = result_folder(options.results, f"advise-{scenario.name}")
        leave_out = _leave_out(options, scenario, deployments, folder)
        plan = Plan(scenario, deployments, options.loads, range(options.rounds), leave_out=leave_out)
        found = compare(plan, folder, lambda line: print(line, flush=True))
        slo = choose_slo(scenario.slo, list(found.idle.values()))
        about = describe(
            scenario=scenario.model_dump(mode="json"), deployments=deployments.model_dump(mode="json"), slo=str(slo)
        )
        write_runs(folder / "samples.json", found.runs, about)
    except (ScenarioError, DeploymentError, ServiceError, GeneratorError, TraceError, NarrowError) as error:
        print(error, file=sys.stderr)
        return 1
    answer: dict[str, Any] = {"choice": None, "disaggregate": None}
    try:
        measured = {name: one for name, one in deployments.deployments.items() if name not in found.left_out}
        verdict = decide(found.runs, measured, slo)
        sentences = list(verdict.sentences)
        answer |= {"choice": verdict.choice, "disaggregate": verdict.disaggregate}
    except ValueError as error:
        sentences = [f"No answer: {error}."]
    page = write_report(folder, f"Advice: {scenario.name}", found.runs, slo, about, sentences)
    if found.left_out:
        sentences.append(f"Not measured, for the simulator sees them far behind: {', '.join(found.left_out)}.")
    print(table(found.runs, slo))
    print("\n".join(sentences))
    print(f"report: {page}")
    print(json.dumps(answer | {"report": str(page)}))
    return 0 if all(run.is_valid for run in found.runs) else 2


def _leave_out(
    options: argparse.Namespace, scenario: Scenario, deployments: Deployments, folder: Path
) -> Callable[[Idle], Sequence[str]] | None:
    """Asks the simulator, where it is given and there is a ratio to choose."""
    every = deployments.deployments
    if options.simulator is None or sum(not one.is_colocated for one in every.values()) < 2:
        return None

    def ask(idle: Idle) -> Sequence[str]:
        slo = choose_slo(scenario.slo, [idle])
        said = narrow(options.simulator, scenario, every, options.loads, idle, slo, folder / "simulated")
        reached = ", ".join(f"{name} {goodput:.3f}" for name, goodput in said.goodput.items())
        print(f"simulated, requests/s within the SLO at best: {reached}", flush=True)
        return said.dropped

    return ask


if __name__ == "__main__":
    sys.exit(main())
