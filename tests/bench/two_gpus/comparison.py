"""Figures of several deployments under the same plays, side by side, and their ratios to vLLM's best.

Pure functions of runs; knows neither a service nor vLLM.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from load_tests.generator import judge
from load_tests.measure import Idle, choose_slo, summarise_idle
from load_tests.samples import Run
from load_tests.scenario import SloRule
from load_tests.stats import Summary, class_stats, goodput, itl_ratio
from tests.bench.two_gpus.plays import IDLE

PEER = "vLLM"
# Bounds of 95% of a request's gaps, as multiples of the fastest idle system's; TTFT may be three times its idle one.
ITL_BOUNDS = (1.5, 2.0, 3.0, 5.0)
NUM_FIGURES = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """One deployment under one play.

    Attributes:
        deployment: its name.
        num_requests: begun in the steady state, by class.
        errors: of these, how many failed.
        ttft_s: percentiles 50, 95 and 99 by class.
        itl_s: the same of the gaps between tokens.
        prompt_tokens_s: prompt tokens per second whose first token came in the steady state.
        output_tokens_s: tokens per second that came in it.
        goodput: requests per second within each of `ITL_BOUNDS`.
        idle: of the same deployment.
        problems: why the run does not count.
    """

    deployment: str
    num_requests: dict[str, int]
    errors: int
    ttft_s: dict[str, tuple[float, ...]]
    itl_s: dict[str, tuple[float, ...]]
    prompt_tokens_s: float
    output_tokens_s: float
    goodput: dict[float, float]
    idle: Idle
    problems: tuple[str, ...]

    @property
    def tokens_s(self) -> float:
        """Of prompts and answers."""
        return self.prompt_tokens_s + self.output_tokens_s


def scenarios(runs: Sequence[Run]) -> list[str]:
    """Names of the plays, idle systems left out."""
    return list(dict.fromkeys(run.scenario for run in runs if not run.scenario.endswith(IDLE)))


def figures_of(runs: Sequence[Run], scenario: str) -> list[Figures]:
    """Of every deployment under one play; all are held to the same bounds.

    Raises:
        ServiceError: an idle system has failed.
    """
    played = [_judged(run) for run in runs if run.scenario == scenario]
    idle = {run.deployment: _idle(run) for run in runs if run.scenario == scenario + IDLE}
    slos = {
        bound: choose_slo(SloRule(itl_times_idle=bound), [idle[run.deployment] for run in played])
        for bound in ITL_BOUNDS
    }
    found = []
    for run in played:
        stats = {kind: class_stats([run], kind) for kind in run.classes()}
        prompt_tokens_s, output_tokens_s = throughput(run)
        found.append(
            Figures(
                deployment=run.deployment,
                num_requests={kind: one.num_requests for kind, one in stats.items()},
                errors=sum(sum(one.errors.values()) for one in stats.values()),
                ttft_s={kind: _percentiles(one.ttft) for kind, one in stats.items()},
                itl_s={kind: _percentiles(one.itl) for kind, one in stats.items()},
                prompt_tokens_s=prompt_tokens_s,
                output_tokens_s=output_tokens_s,
                goodput={bound: goodput([run], slo) for bound, slo in slos.items()},
                idle=idle[run.deployment],
                problems=run.generator.problems,
            )
        )
    return found


def throughput(run: Run) -> tuple[float, float]:
    """Prompt and output tokens per second of the steady state, each counted when it came."""
    prompt_tokens, output_tokens = 0, 0.0
    for sample in run.samples:
        if sample.ttft_s is None or sample.sent_s is None:
            continue
        first_s = sample.sent_s + sample.ttft_s
        times = [first_s, *(end for end, _ in sample.gap_ends_s())]
        # An event may bring several tokens; of a request without an end it is not known how many.
        per_event = max(1.0, sample.output_tokens / len(times))
        output_tokens += per_event * sum(map(run.in_window, times))
        prompt_tokens += sample.prompt_tokens * run.in_window(first_s)
    return prompt_tokens / run.duration_s, output_tokens / run.duration_s


def ratios(runs: Sequence[Run], scenario: str) -> dict[str, dict[str, float | None]]:
    """Each deployment of ours over the best of vLLM's in each single figure; above 1 ours is better.

    Returns:
        By deployment and figure; None where vLLM's figure or ours is 0 or missing. {} without any of vLLM's.
    """
    found = figures_of(runs, scenario)
    peers = [one for one in found if one.deployment.startswith(PEER)]
    if not peers:
        return {}
    return {one.deployment: _ratios(one, peers) for one in found if one not in peers}


def tail_intervals(runs: Sequence[Run], scenario: str, kind: str) -> dict[str, dict[str, dict[str, float]]]:
    """p99 ITL of each of vLLM's over each of ours, with its 95% interval."""
    own = [run for run in runs if run.scenario == scenario]
    peers = [run for run in own if run.deployment.startswith(PEER)]
    return {
        run.deployment: {peer.deployment: asdict(itl_ratio([peer], [run], kind)) for peer in peers}
        for run in own
        if run not in peers
    }


def _ratios(ours: Figures, peers: list[Figures]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for kind in ours.num_requests:
        for name, place in (("p50", 0), ("p95", 1), ("p99", 2)):
            for figure, values in (("TTFT", ours.ttft_s[kind]), ("ITL", ours.itl_s[kind])):
                theirs = [(one.ttft_s if figure == "TTFT" else one.itl_s)[kind] for one in peers]
                found[f"{kind} {figure} {name}"] = _quotient(min(one[place] for one in theirs), values[place])
    found["tokens/s"] = _quotient(ours.tokens_s, max(one.tokens_s for one in peers))
    found["output tokens/s"] = _quotient(ours.output_tokens_s, max(one.output_tokens_s for one in peers))
    for bound in ITL_BOUNDS:
        found[f"goodput {bound:g}x"] = _quotient(ours.goodput[bound], max(one.goodput[bound] for one in peers))
    return found


def _quotient(above: float, below: float) -> float | None:
    return above / below if above > 0 and below > 0 else None


def _percentiles(summary: Summary | None) -> tuple[float, ...]:
    if summary is None:
        return (float("nan"),) * NUM_FIGURES
    return tuple(summary.percentiles[percent] for percent in (50, 95, 99))


def _judged(run: Run) -> Run:
    return replace(run, generator=judge(run.samples, run.generator.cpu))


def _idle(run: Run) -> Idle:
    return summarise_idle(run.samples, run.classes(), run.deployment)


def lines(runs: Sequence[Run], scenario: str, started_s: dict[str, float]) -> Iterator[str]:
    """The table of one play, to be printed."""
    bounds = "/".join(f"{bound:g}" for bound in ITL_BOUNDS)
    yield f"{scenario}: TTFT s and ITL ms p50/p95/p99; tokens/s out + in; goodput at {bounds} x idle ITL"
    for one in figures_of(runs, scenario):
        good = "/".join(f"{one.goodput[bound]:.2f}" for bound in ITL_BOUNDS)
        yield (
            f" {one.deployment}: {one.output_tokens_s:.0f} + {one.prompt_tokens_s:.0f} tokens/s, goodput {good},"
            f" idle ITL {one.idle.itl_s * 1e3:.2f}, up after {started_s.get(one.deployment, float('nan')):.0f} s,"
            f" {one.errors} errors{''.join(f'; {problem}' for problem in one.problems)}"
        )
        for kind, count in one.num_requests.items():
            ttft = "/".join(f"{value:.3f}" for value in one.ttft_s[kind])
            itl = "/".join(f"{value * 1e3:.1f}" for value in one.itl_s[kind])
            idle_s = one.idle.ttft_s.get(kind, float("nan"))
            yield f"   {kind:>6} {count:>4} requests, TTFT {ttft} (idle {idle_s:.3f}), ITL {itl}"
    for name, found in ratios(runs, scenario).items():
        shown = ", ".join(f"{figure} {value:.2f}" for figure, value in found.items() if value is not None)
        yield f" {name} beside vLLM's best of each: {shown}"
