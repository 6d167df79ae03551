"""The simulator beside the service: the same small workload, first tokens and gaps of both.

Run: `make bench-simulator`. Brings the default model up, colocated on one engine and then with one engine in each pool.
While the load is played to the service, what that tells of itself teaches what steps, hand-offs and calls cost in the
mean; then its arrivals are played to the simulator with these costs, and the whole distributions are compared. Prints a
table and, as its last line, one JSON object; ends with 1 if p50 or p99 of TTFT or ITL differ by more than 20%.

The load comes in rounds. One in which others used the machine, a request failed or the load came late does not count,
and the next one takes its place; if there are too few that count, the bench ends with 2, without a verdict.

Two engines share the cores of this machine, so each is slower while the other computes. By how much is told first, by
one answer beside many prompts; what steps take of one alone is then such that they take in the mean what was measured
(`alone.py`). That the ingress, Ray and the client share the cores as well the simulator does not know, but for what
steps cost while all of them run.

`--shape llama-8b` compares both on GPUs, one for each engine: a model of that shape with random weights, `gpus.yaml`.
With four, `--deployments "2 + 2" --load 2` has two engines in each pool.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from deployments.simulator.pools import PoolSetup
from deployments.simulator.requests import Request
from deployments.simulator.scaling import Fixed
from deployments.simulator.service import Service, Setup
from load_tests.environment import describe
from load_tests.samples import write_runs
from load_tests.scenario import Scenario, load_scenario
from tests.bench.player import play, run
from tests.bench.service import serving
from tests.bench.simulator.alone import Means, alone, answer_beside_prompts
from tests.bench.simulator.ground import DEPLOYMENTS, FOLDER, ITL_S, MIN_REMOTE_TOKENS, TTFT_S, Ground, ground_of
from tests.bench.simulator.rounds import Round, Rounds, Use, UseWatch
from tests.bench.simulator.teacher import Snapshot, Teacher, learn_slowdown, watching

MAX_ERROR = 0.2
WARMUP_S = 20.0
APART_S = 600.0
# An answer beside prompts is awaited for so long.
BESIDE_S = 120.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one deployment.

    Attributes:
        service: measured.
        simulator: the same arrivals, played.
        errors: of each figure, the simulator's over the service's, less 1.
        setup: what the service has taught.
        num_requests: that were compared.
        together: share of the service's gaps in which no step fits: tokens that were held up behind the engine and then
            came together. The simulator knows of none.
        uses: of the cores in each round that counts, by role.
        spoilt: why each of the other rounds does not.
        problems: why it is no measurement.
    """

    service: Figures
    simulator: Figures
    errors: dict[str, float]
    setup: dict[str, object]
    num_requests: int
    together: float
    uses: list[Use]
    spoilt: list[str]
    problems: list[str]


def learn(rounds: Sequence[Round], name: str, max_num_batched_tokens: int) -> Setup:
    """What a load has taught of the service."""
    teacher, prefill = Teacher([one.watch for one in rounds]), None
    num_prefill, num_decode = DEPLOYMENTS[name]
    if num_prefill:
        prefill = teacher.curves("prefill", max_num_batched_tokens)
    decode = teacher.curves("decode", max_num_batched_tokens, 0.0 if prefill is None else prefill.token_s)
    ttft_s = [sample.ttft_s for one in rounds for sample in one.run.samples if sample.ttft_s is not None]
    at_engine = teacher.ttft("decode" if prefill is None else "prefill")
    call_s = max(0.0, float(np.mean(ttft_s)) - at_engine.mean_s)

    pool = None if prefill is None else PoolSetup(prefill, most=num_prefill, initial=num_prefill)
    own = PoolSetup(decode, most=num_decode, initial=num_decode)
    return Setup(own, pool, TTFT_S, ITL_S, MIN_REMOTE_TOKENS, call_s=call_s)


def learn_apart(rounds: Sequence[Round], setup: Setup, slowdown: float) -> Setup:
    """With engines that slow each other, as `alone.py` has them."""
    wanted = Teacher([one.watch for one in rounds]).means
    return alone(setup, slowdown, wanted, lambda found: simulate(rounds, found)[1])


def simulate(rounds: Sequence[Round], setup: Setup) -> tuple[Figures, Means]:
    """Play arrivals that were measured: those of the next round long after the last answer of the one before."""
    requests, begun_s = list[Request](), 0.0
    for one in rounds:
        sent = sorted(one.run.samples, key=lambda sample: sample.start_s)
        requests += [Request(begun_s + s.start_s, s.prompt_tokens, s.output_tokens) for s in sent]
        begun_s = requests[-1].at_s + APART_S
    service = Service(setup, Fixed())
    service.play(requests)
    ttft_s = [request.ttft_s if request.ttft_s is not None else math.nan for request in requests]
    figures = Figures(*_percentiles(ttft_s), *service.gaps.quantiles((0.5, 0.99)))
    engines = {
        (name, one.name): one.engine.stats for name, pool in service.pools.items() for one in pool.replicas.values()
    }
    return figures, Teacher([[Snapshot(), Snapshot(engines)]]).means


def measured(rounds: Sequence[Round]) -> Figures:
    """What clients saw."""
    samples = [sample for one in rounds for sample in one.run.samples]
    ttft_s = [sample.ttft_s if sample.ttft_s is not None else math.nan for sample in samples]
    return Figures(*_percentiles(ttft_s), *_percentiles([gap for sample in samples for gap in sample.gaps_s]))


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(values, (50, 99))
    return float(p50), float(p99)


def measure(
    name: str, ground: Ground, scenario: Scenario, port: int, load: float, rounds: Rounds, arguments: Sequence[str]
) -> float:
    """Bring a deployment up, and play rounds; returns by how much its engines slow each other."""
    short = scenario.model_copy(update={"duration_s": WARMUP_S})

    def one(number: int) -> Round:
        use = UseWatch(FOLDER)
        with watching(port, ground.block_size) as watch, use.watching():
            found = run(scenario, port, ground.model, name, number, load)
        return Round(found, use.use, watch)

    with serving(FOLDER, port, [*ground.arguments_of(name), *arguments]):
        run(short, port, ground.model, name, -1, load)  # what is slow once
        are_together = ground.has_shared_cores and name != "colocated"
        slowdown = measure_slowdown(port, ground) if are_together else 1.0
        rounds.play(one, lambda words: print(f"{name}, {words}", flush=True))
    return slowdown


def measure_slowdown(port: int, ground: Ground) -> float:
    """By one answer beside many prompts."""
    with watching(port, ground.block_size) as watch:
        samples = play(answer_beside_prompts(), port, ground.model, BESIDE_S, BESIDE_S)
    if failed := [sample.error for sample in samples if sample.error is not None]:
        raise RuntimeError(f"{len(failed)} requests failed beside each other: {failed[0]}")
    return learn_slowdown([watch])


def compare(name: str, ground: Ground, rounds: Rounds, slowdown: float) -> Comparison:
    """Learn, and play the same to the simulator: from the rounds that count, and from all if none does."""
    played = rounds.clean or rounds.spoilt
    setup = learn(played, name, ground.max_num_batched_tokens)
    if slowdown > 1.0:
        setup = learn_apart(played, setup, slowdown)
    ours, theirs = simulate(played, setup)[0], measured(played)
    errors = {key: value / asdict(theirs)[key] - 1.0 for key, value in asdict(ours).items()}
    num_requests, spoilt = sum(len(one.run.samples) for one in played), ["; ".join(o.problems) for o in rounds.spoilt]
    uses, together = [one.use for one in played], share_together(played, setup.decode.curves.step_s)
    return Comparison(theirs, ours, errors, asdict(setup), num_requests, together, uses, spoilt, rounds.problems)


def share_together(rounds: Sequence[Round], step_s: float) -> float:
    """Of gaps that are shorter than half a step."""
    gaps_s = [gap for one in rounds for sample in one.run.samples for gap in sample.gaps_s]
    return sum(gap < step_s / 2 for gap in gaps_s) / max(1, len(gaps_s))


def print_rows(name: str, one: Comparison) -> None:
    """Both lines of a deployment, and what they differ by."""
    print(f"\n{name}: {one.num_requests} requests in {len(one.uses)} rounds; {'; '.join(one.problems) or 'valid'}")
    for who, figures in (("service", one.service), ("simulator", one.simulator)):
        print(f"{who:12}" + "".join(f"{key} {value * 1e3:8.1f} ms  " for key, value in asdict(figures).items()))
    print(f"a step takes {one.setup['shared_slowdown']:.2f} times as long while the other engine computes")
    print(f"{one.together:.1%} of the service's gaps are shorter than half a step: tokens that came together")
    print(f"{'off by':12}" + "".join(f"{key} {error:+8.1%}     " for key, error in one.errors.items()), flush=True)


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(prog="make bench-simulator ARGS=...")
    parser.add_argument("--port", type=int, default=8138)
    parser.add_argument("--load", type=float, default=1.0, help="multiplier of the arrivals")
    parser.add_argument("--duration", type=float, help="seconds of a round")
    parser.add_argument("--rounds", type=int, default=3, help="that are to count")
    parser.add_argument("--most-rounds", type=int, default=5, help="that are played until so many do")
    parser.add_argument("--samples", type=Path, help="folder to write: every request and gap, as clients saw them")
    parser.add_argument("--deployments", nargs="*", choices=list(DEPLOYMENTS), help="on a CPU colocated and 1 + 1")
    parser.add_argument("--shape", help="of a model with random weights, as llama-8b; each engine has a GPU")
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="more arguments of the application")
    options = parser.parse_args()
    changes = {} if options.duration is None else {"duration_s": options.duration}
    ground = ground_of(options.shape)
    scenario = load_scenario(str(ground.scenario), changes)
    compared = {}
    for name in options.deployments or ground.deployments:
        rounds = Rounds(options.rounds, options.most_rounds)
        slowdown = measure(name, ground, scenario, options.port, options.load, rounds, options.arguments)
        if options.samples:
            _save(options.samples, name, rounds)
        compared[name] = compare(name, ground, rounds, slowdown)
        print_rows(name, compared[name])
    worst = max(abs(error) for one in compared.values() for error in one.errors.values())
    is_valid = not any(one.problems for one in compared.values())
    passed = None if not is_valid else worst <= MAX_ERROR
    report = {
        "bench": "simulator",
        "bound": MAX_ERROR,
        "worst": worst,
        "passed": passed,
        "about": describe(gpus=ground.gpus),
    }
    print(json.dumps(report | {"deployments": {name: asdict(one) for name, one in compared.items()}}, default=str))
    if passed is None:
        return 2
    return 0 if passed else 1


def _save(folder: Path, name: str, rounds: Rounds) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs = [one.run for one in (*rounds.clean, *rounds.spoilt)]
    write_runs(folder / f"{name.replace(' ', '')}.json", runs, describe())


if __name__ == "__main__":
    sys.exit(main())
