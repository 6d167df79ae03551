"""Colocated or disaggregated, and with which ratio: the answer that a comparison gives, with how sure it is.

Pure. Disaggregation has to be worth its second pool: without clear evidence the answer is to stay colocated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from load_tests.deployments import Deployment
from load_tests.samples import Run
from load_tests.stats import Ratio, Slo, attainment, goodput, goodput_ratio

# A gain below this is not worth a second pool to look after.
LEAST_GAIN = 1.05
# Share of resamples in which disaggregated must win.
SURE = 0.95


@dataclass(frozen=True, slots=True)
class Best:
    """What a deployment reaches: the load at which its goodput is highest."""

    deployment: str
    load: float
    goodput: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer.

    Attributes:
        choice: name of the deployment to use.
        disaggregate: whether that is a disaggregated one.
        best: what each deployment reaches, best first.
        ratio: goodput of the best disaggregated over the best colocated; None where one of them is missing.
        sentences: the answer in words, with its figures.
    """

    choice: str
    disaggregate: bool
    best: tuple[Best, ...]
    ratio: Ratio | None
    sentences: tuple[str, ...]


def decide(runs: Sequence[Run], deployments: dict[str, Deployment], slo: Slo) -> Verdict:
    """Choose among deployments; only valid runs count.

    Raises:
        ValueError: some deployment has no valid run.
    """
    best = sorted((_best(name, runs, slo) for name in deployments), key=lambda one: -one.goodput)
    colocated = next((one for one in best if deployments[one.deployment].is_colocated), None)
    split = next((one for one in best if not deployments[one.deployment].is_colocated), None)
    ratio = None
    if colocated and split:
        ratio = goodput_ratio(*same_rounds(*(_runs(runs, one.deployment, one.load) for one in (split, colocated))), slo)
    disaggregate = split is not None and (
        ratio is None or (ratio.value >= LEAST_GAIN and ratio.probability_above_1 >= SURE)
    )
    chosen = split if disaggregate else colocated
    assert chosen is not None
    sentences = [_answer(chosen, deployments[chosen.deployment], disaggregate), *(_reached(one) for one in best)]
    if ratio is not None and split and colocated:
        sentences.append(_evidence(split, colocated, ratio))
    return Verdict(chosen.deployment, disaggregate, tuple(best), ratio, tuple(sentences))


def _best(name: str, runs: Sequence[Run], slo: Slo) -> Best:
    loads = sorted({run.load for run in runs if run.deployment == name and run.is_valid})
    if not loads:
        raise ValueError(f"{name}: no valid run; the generator did not keep up")
    reached = {load: goodput(_runs(runs, name, load), slo) for load in loads}
    load = max(loads, key=lambda load: reached[load])
    return Best(name, load, reached[load], attainment(_runs(runs, name, load), slo) or 0.0)


def _runs(runs: Sequence[Run], name: str, load: float) -> list[Run]:
    return [run for run in runs if run.deployment == name and run.load == load and run.is_valid]


def same_rounds(above: list[Run], below: list[Run]) -> tuple[list[Run], list[Run]]:
    """Leave out rounds in which one side's run was invalid."""
    common = {run.round for run in above} & {run.round for run in below}
    if not common:
        raise ValueError("no round has a valid run of both sides; the generator did not keep up")
    return [run for run in above if run.round in common], [run for run in below if run.round in common]


def _answer(chosen: Best, deployment: Deployment, disaggregate: bool) -> str:
    if not disaggregate:
        return f"Stay colocated: {chosen.deployment} ({deployment.num_decode} engines that do both)."
    ratio = f"{deployment.num_prefill} prefill to {deployment.num_decode} decode engines"
    return f"Disaggregate: {chosen.deployment} ({ratio})."


def _reached(one: Best) -> str:
    return (
        f"{one.deployment} serves at best {one.goodput:.3f} requests/s within the SLO, at load {one.load:g}, where "
        f"{one.attainment:.0%} of its requests keep it."
    )


def _evidence(split: Best, colocated: Best, ratio: Ratio) -> str:
    return (
        f"{split.deployment} over {colocated.deployment}: {ratio.value:.2f} times the goodput (95% interval "
        f"{ratio.low:.2f} to {ratio.high:.2f}); it won in {ratio.probability_above_1:.1%} of the resamples."
    )
