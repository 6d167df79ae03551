"""Pairs of looks say what differs, whatever the machine does meanwhile; CPU is counted finely."""

import os
import time

import pytest

from tests.bench.serving.analysis import pair_up
from tests.bench.serving.server import _cpu_clock


def test_a_machine_that_gets_slower_changes_no_ratio() -> None:
    told = pair_up([(1.1 * speed, speed) for speed in (1.0, 1.0, 2.0, 4.0, 4.0)])
    assert (told.ratio, told.low, told.high) == pytest.approx((1.1, 1.1, 1.1))
    assert (told.first, told.second, told.more, told.count) == pytest.approx((2.2, 2.0, 0.2, 5))


def test_one_pair_that_was_disturbed_is_told_by_the_spread_and_not_by_the_ratio() -> None:
    told = pair_up([(1.0, 1.0), (1.02, 1.0), (1.04, 1.0), (9.0, 1.0)])
    assert told.ratio == pytest.approx(1.03)
    assert told.low == pytest.approx(1.015) and told.high > 1.04


def test_cpu_of_a_process_is_told_between_two_ticks() -> None:
    for _ in range(3):
        before_s = time.process_time()
        told_s = time.clock_gettime(_cpu_clock(os.getpid()))
        assert before_s <= told_s <= time.process_time()
