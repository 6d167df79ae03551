"""Colocated or disaggregated? `python -m load_tests.advise SCENARIO --deployments FILE` measures and answers.

Brings each deployment of the file up in turn on the same hardware, finds what it does when idle, sets the SLO from
that, sweeps the load, and says which deployment serves most requests within the SLO, and how sure that is.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from load_tests.compare import Plan, compare
from load_tests.deployments import DeploymentError, load_deployments
from load_tests.environment import describe
from load_tests.generator import GeneratorError
from load_tests.measure import ServiceError, choose_slo
from load_tests.report import table, write_report
from load_tests.run import add_scenario_arguments, changes_of, result_folder
from load_tests.samples import write_runs
from load_tests.scenario import ScenarioError, load_scenario
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
    options = parser.parse_args(arguments)
    try:
        scenario = load_scenario(options.scenario, changes_of(options))
        deployments = load_deployments(options.deployments)
        folder = result_folder(options.results, f"advise-{scenario.name}")
        plan = Plan(scenario, deployments, options.loads, range(options.rounds))
        found = compare(plan, folder, lambda line: print(line, flush=True))
        slo = choose_slo(scenario.slo, list(found.idle.values()))
        about = describe(
            scenario=scenario.model_dump(mode="json"), deployments=deployments.model_dump(mode="json"), slo=str(slo)
        )
        write_runs(folder / "samples.json", found.runs, about)
    except (ScenarioError, DeploymentError, ServiceError, GeneratorError, TraceError) as error:
        print(error, file=sys.stderr)
        return 1
    answer: dict[str, Any] = {"choice": None, "disaggregate": None}
    try:
        verdict = decide(found.runs, deployments.deployments, slo)
        sentences = list(verdict.sentences)
        answer |= {"choice": verdict.choice, "disaggregate": verdict.disaggregate}
    except ValueError as error:
        sentences = [f"No answer: {error}."]
    page = write_report(folder, f"Advice: {scenario.name}", found.runs, slo, about, sentences)
    print(table(found.runs, slo))
    print("\n".join(sentences))
    print(f"report: {page}")
    print(json.dumps(answer | {"report": str(page)}))
    return 0 if all(run.is_valid for run in found.runs) else 2


if __name__ == "__main__":
    sys.exit(main())
