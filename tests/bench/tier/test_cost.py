"""A median's interval, and what it tells of a bound."""

import random

import pytest

from tests.bench.tier.cost import CONTROL, OFF, ON, Interval, judge, ratios


def test_an_interval_holds_the_true_median_as_often_as_it_says() -> None:
    draw = random.Random(3)
    held = 0
    for _ in range(2000):
        interval = Interval.of([draw.lognormvariate(0.0, 0.3) for _ in range(20)])
        held += interval.low <= 1.0 <= interval.high
    assert 0.94 < held / 2000 < 0.985


def test_few_values_tell_no_more_than_their_range() -> None:
    assert Interval.of([1.2, 1.0, 1.1]) == Interval(1.1, 1.0, 1.2)


def test_twenty_values_leave_five_out_on_either_side() -> None:
    assert Interval.of([float(i) for i in range(20)]) == Interval(9.5, 5.0, 14.0)


def test_a_ratio_is_of_its_own_round_so_that_a_slow_machine_slows_both_sides() -> None:
    found = ratios({ON: [1.1, 11.0, 110.0], OFF: [1.0, 10.0, 100.0], CONTROL: [1.0, 10.0, 100.0]})
    assert found[ON].low == pytest.approx(1.1)
    assert found[ON].high == pytest.approx(1.1)
    assert found[CONTROL] == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.98, 1.03, "kept"), (1.031, 1.2, "not kept"), (0.9, 1.1, "not told: the interval holds the bound")],
)
def test_a_bound_is_judged_by_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert judge(Interval((low + high) / 2, low, high), 0.03) == verdict
