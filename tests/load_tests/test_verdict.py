"""The answer: disaggregate only where it was measured to pay, and with a statement of how sure that is."""

import pytest

from load_tests.deployments import Deployment
from load_tests.stats import Slo
from load_tests.verdict import decide
from tests.load_tests.runs import WARMUP_S, build_run, build_sample

SLO = Slo({"chat": 1.0}, itl_s=0.2)
DEPLOYMENTS = {
    "colocated": Deployment(num_prefill=0, num_decode=4, start="", stop=""),
    "one to three": Deployment(num_prefill=1, num_decode=3, start="", stop=""),
    "two to two": Deployment(num_prefill=2, num_decode=2, start="", stop=""),
}


def run(deployment: str, num_good: int, load: float = 1.0, round_: int = 0, num: int = 20, problems=()):
    """`num` requests spread over the steady state, the first of each stretch good and the others too late."""
    samples = [
        build_sample(sent_s=WARMUP_S + i, ttft_s=0.5 if (i * num_good) % num < num_good else 5.0) for i in range(num)
    ]
    return build_run(samples, deployment, load, round_, problems)


def runs(**good: int):
    names = {"colocated": "colocated", "one": "one to three", "two": "two to two"}
    return [run(names[name], count, round_=round_) for name, count in good.items() for round_ in (0, 1)]


def test_the_deployment_with_most_requests_within_the_slo_is_chosen_with_its_ratio():
    verdict = decide(runs(colocated=5, one=10, two=20), DEPLOYMENTS, SLO)
    assert (verdict.choice, verdict.disaggregate) == ("two to two", True)
    assert verdict.ratio is not None and verdict.ratio.value == pytest.approx(4.0)
    assert verdict.sentences[0] == "Disaggregate: two to two (2 prefill to 2 decode engines)."
    assert [best.deployment for best in verdict.best] == ["two to two", "one to three", "colocated"]


def test_without_a_gain_it_stays_colocated():
    verdict = decide(runs(colocated=10, one=10, two=5), DEPLOYMENTS, SLO)
    assert (verdict.choice, verdict.disaggregate) == ("colocated", False)
    assert verdict.sentences[0].startswith("Stay colocated")


def test_a_gain_that_may_be_chance_is_not_enough():
    few = {name: DEPLOYMENTS[name] for name in ("colocated", "one to three")}
    better_once = [run("one to three", 12), run("one to three", 9, round_=1)]
    verdict = decide([run("colocated", 9), run("colocated", 10, round_=1), *better_once], few, SLO)
    assert verdict.ratio is not None and verdict.ratio.value > 1.05
    assert not verdict.disaggregate


def test_each_deployment_is_taken_at_its_best_load():
    found = [run("colocated", 10, load=1.0), run("colocated", 2, load=2.0)]
    found += [run("one to three", 8, load=1.0), run("one to three", 20, load=2.0)]
    verdict = decide(found, {name: DEPLOYMENTS[name] for name in ("colocated", "one to three")}, SLO)
    assert [(best.deployment, best.load) for best in verdict.best] == [("one to three", 2.0), ("colocated", 1.0)]


def test_an_invalid_run_does_not_count_on_either_side():
    found = [
        *runs(colocated=5, one=20),
        run("colocated", 20, round_=2, problems=["late"]),
        run("one to three", 0, 1, 2),
    ]
    few = {name: DEPLOYMENTS[name] for name in ("colocated", "one to three")}
    verdict = decide(found, few, SLO)
    assert verdict.ratio is not None and verdict.ratio.value == pytest.approx(4.0)


def test_no_valid_run_is_no_answer():
    with pytest.raises(ValueError, match="colocated: no valid run"):
        decide([run("colocated", 5, problems=["late"])], {"colocated": DEPLOYMENTS["colocated"]}, SLO)
