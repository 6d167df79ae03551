"""What a step costs is learned from sums of steps, with ends that say how little is known."""

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments.load.step_cost import UNKNOWN, Estimate, StepCost

Measurement = tuple[float, float, float]


def learn(*measurements: Measurement) -> StepCost:
    cost = StepCost()
    for steps, tokens, seconds in measurements:
        cost.add(steps, tokens, seconds)
    return cost


def noisy(rng: random.Random, per_step: float, per_token: float, spread: float) -> Measurement:
    steps = rng.randint(1, 5)
    tokens = sum(rng.choice((10, 100, 512)) for _ in range(steps))
    return steps, tokens, (per_step * steps + per_token * tokens) * rng.uniform(1 - spread, 1 + spread)


def test_without_measurements_nothing_is_excluded() -> None:
    assert StepCost().seconds(1, 100) == UNKNOWN
    assert learn((0, 5, 1.0), (5, 0, 1.0), (1, 1, 0.0), (1, 1, math.inf), (-1, 5, 1.0)).seconds(1, 1) == UNKNOWN
    assert StepCost().seconds(0, 0) == Estimate(0, 0, 0)


def test_both_costs_are_found_where_steps_differ() -> None:
    cost = learn(*[(1, tokens, 0.05 + 0.002 * tokens) for tokens in (10, 500, 100, 30, 300) * 4])
    assert cost.seconds(1, 0).best == pytest.approx(0.05)
    assert cost.seconds(0, 1000).best == pytest.approx(2.0)
    assert cost.seconds(16, 8192).best == pytest.approx(16 * 0.05 + 8192 * 0.002)


def test_steps_that_are_all_alike_tell_what_such_steps_cost_and_no_more() -> None:
    cost = learn(*[(1, 100, 1.0)] * 30)
    same = cost.seconds(7, 700)
    assert same.best == pytest.approx(7) and same.low > 6.4 and same.high < 7.6
    large = cost.seconds(7, 3500)
    assert large.low == pytest.approx(same.low), "all of it may be for the step"
    assert large.high == pytest.approx(5 * same.high), "or for the tokens"


def test_little_evidence_says_so() -> None:
    short = learn((1, 67, 0.3)).seconds(5, 2402)
    assert short.low == 0 and short.best > 5
    longer = learn(*[(1, 67, 1.0)] * 10).seconds(5, 2402)
    assert 0 < longer.low < 6 < 30 < longer.best <= longer.high


def test_what_was_long_ago_is_forgotten_and_idling_forgets_nothing() -> None:
    cost = learn(*[(1, 100, 1.0)] * 30)
    before = cost.seconds(1, 100)
    cost.add(0, 0, 0.0)
    assert cost.seconds(1, 100) == before
    for _ in range(300):
        cost.add(1, 100, 0.2)
    assert cost.seconds(1, 100).best == pytest.approx(0.2, rel=0.01)


def test_one_long_measurement_does_not_outweigh_all_others() -> None:
    cost = learn(*[(1, 100, 1.0)] * 10, (1, 100, 3600.0))
    assert cost.evidence_s < 25
    for _ in range(200):
        cost.add(1, 100, 1.0)
    assert cost.seconds(1, 100).best == pytest.approx(1.0, rel=0.05)


def test_a_reading_that_is_split_in_two_says_nearly_the_same() -> None:
    whole = learn(*[(4, 800, 2.0)] * 40).seconds(10, 2000)
    halves = learn(*[(2, 400, 1.0)] * 80).seconds(10, 2000)
    assert halves.best == pytest.approx(whole.best)
    assert halves.low == pytest.approx(whole.low, rel=0.05)


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_the_truth_lies_between_the_ends_most_of_the_time(spread: float) -> None:
    num_inside = num_all = 0
    for seed in range(200):
        rng = random.Random(seed)
        per_step, per_token = 10 ** rng.uniform(-3, -1), 10 ** rng.uniform(-4, -2)
        cost = learn(*[noisy(rng, per_step, per_token, spread) for _ in range(rng.randint(1, 40))])
        steps, tokens = rng.randint(1, 20), rng.randint(1, 10_000)
        estimate, true_s = cost.seconds(steps, tokens), per_step * steps + per_token * tokens
        num_inside += estimate.low <= true_s <= estimate.high
        num_all += 1
    assert num_inside >= 0.9 * num_all, f"{num_inside} of {num_all}"


def test_more_evidence_narrows_the_ends() -> None:
    def width(count: int) -> float:
        rng = random.Random(5)
        estimate = learn(*[noisy(rng, 0.05, 0.002, 0.1) for _ in range(count)]).seconds(8, 4096)
        return estimate.high - estimate.low

    assert width(40) < 0.5 * width(3) < width(1)


sizes = st.floats(1e-6, 1e9)
measurements = st.tuples(sizes, sizes, st.floats(1e-9, 1e6))


@given(seen=st.lists(measurements, min_size=1, max_size=30), steps=st.floats(0, 1e9), tokens=st.floats(0, 1e9))
def test_ends_are_ordered_finite_and_scale_with_what_is_asked(
    seen: list[Measurement], steps: float, tokens: float
) -> None:
    cost = learn(*seen)
    estimate = cost.seconds(steps, tokens)
    assert 0 <= estimate.low <= estimate.best <= estimate.high < math.inf
    double = cost.seconds(2 * steps, 2 * tokens)
    assert double.best == pytest.approx(2 * estimate.best)
    more = cost.seconds(steps + 1, tokens * 2 + 1)
    for end in ("low", "best", "high"):
        assert getattr(more, end) >= getattr(estimate, end) * (1 - 1e-6), "no cost is negative"


@given(
    per_step=st.floats(1e-5, 10),
    per_token=st.floats(1e-7, 1),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(),
)
def test_exact_measurements_are_reproduced_at_any_scale(
    per_step: float, per_token: float, scale: float, seed: int
) -> None:
    rng = random.Random(seed)
    cost = StepCost(half_life_s=1e9)
    cost.add(1, 1, scale * (per_step + per_token))
    for _ in range(20):
        steps, tokens, seconds = noisy(rng, per_step, per_token, 0.0)
        cost.add(steps, tokens, scale * seconds)
        estimate = cost.seconds(steps, tokens)
        assert estimate.low <= scale * seconds * (1 + 1e-6) and estimate.high >= scale * seconds * (1 - 1e-6)
    assert cost.seconds(3, 700).best == pytest.approx(scale * (3 * per_step + 700 * per_token), rel=1e-3)
