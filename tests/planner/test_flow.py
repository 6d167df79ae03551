"""How unevenly something arrives."""

import random

import pytest

from deployments.planner.flow import Flow


def poisson(draw: random.Random, rate: float) -> int:
    count, at = 0, draw.expovariate(rate)
    while at < 1:
        count, at = count + 1, at + draw.expovariate(rate)
    return count


def run(flow: Flow, draw: random.Random, seconds: int, rate: float, size: float) -> None:
    for _ in range(seconds):
        flow.add(size * poisson(draw, rate), 1.0)


def test_single_arrivals_at_random_vary_as_much_as_they_are_large():
    draw, ratios = random.Random(0), []
    for _ in range(20):
        flow = Flow(2.0)
        run(flow, draw, 400, rate=3.0, size=5.0)
        ratios.append(flow.rate.variance / flow.rate.slow)
    assert sum(ratios) / len(ratios) == pytest.approx(5.0, rel=0.1)


def test_that_less_comes_than_before_is_no_unevenness():
    draw, left = random.Random(0), []
    for _ in range(20):
        flow = Flow(2.0)
        run(flow, draw, 200, rate=1.5, size=1.0)
        run(flow, draw, 60, rate=1.5, size=5.0)
        before = flow.rate.variance
        run(flow, draw, 200, rate=1.5, size=1.0)
        left.append(flow.rate.variance / before)
    assert sum(left) / len(left) < 0.27
