"""One scenario against one running service: `python -m load_tests.run mixed --url http://127.0.0.1:8000`."""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from load_tests.environment import describe
from load_tests.generator import GeneratorError
from load_tests.measure import ServiceError, choose_slo, find_target, measure, measure_idle
from load_tests.report import table, write_report
from load_tests.samples import write_runs
from load_tests.scenario import FOLDER, ScenarioError, load_scenario
from load_tests.trace import TraceError

RESULTS = Path("load_tests/results")


def result_folder(parent: Path, name: str) -> Path:
    """Make a new folder for one report."""
    folder = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    folder.mkdir(parents=True)
    return folder


def add_scenario_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all commands share: the scenario, what to change in it, where reports go."""
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
    parser.add_argument("scenario", help=f"a .yaml file, or one of {known}")
    parser.add_argument("--duration", type=float, help="seconds of steady state, in place of the scenario's")
    parser.add_argument("--rounds", type=int, default=1, help="times each measurement is repeated (default: 1)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where reports go (default: %(default)s)")


def changes_of(options: argparse.Namespace) -> dict[str, float]:
    """What the command line changes in the scenario."""
    return {} if options.duration is None else {"duration_s": options.duration}


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 when it was valid, 2 when the generator did not keep up, 1 when it could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.run",
        description="Load a running service. Its API key, if it wants one, is read from the variable OPENAI_API_KEY.",
    )
    add_scenario_arguments(parser)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")
    parser.add_argument("--model", help="its name in the API; else the first that the service names")
    parser.add_argument("--load", type=float, default=1.0, help="multiplier of the arrival rates (default: 1)")
    options = parser.parse_args(arguments)
    try:
        scenario = load_scenario(options.scenario, changes_of(options))
        target = find_target(options.url, options.model)
        folder = result_folder(options.results, scenario.name)
        print("measuring the idle service", flush=True)
        slo = choose_slo(scenario.slo, [measure_idle(scenario, target, folder / "idle")])
        runs = []
        for round_ in range(options.rounds):
            print(f"round {round_}: {scenario.warmup_s:g} s warm-up, {scenario.duration_s:g} s measured", flush=True)
            runs.append(measure(scenario, target, folder / f"round-{round_}", "service", options.load, round_))
    except (ScenarioError, ServiceError, GeneratorError, TraceError) as error:
        print(error, file=sys.stderr)
        return 1
    about = describe(scenario=scenario.model_dump(mode="json"), url=target.url, model=target.model)
    write_runs(folder / "samples.json", runs, about)
    page = write_report(folder, f"Load test: {scenario.name}", runs, slo, about, [scenario.description])
    print(table(runs, slo))
    print(f"report: {page}")
    return 0 if all(run.is_valid for run in runs) else 2


if __name__ == "__main__":
    sys.exit(main())
