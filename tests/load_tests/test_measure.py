"""The SLO that an idle system sets, and what is said when a service cannot be asked."""

import pytest

from load_tests.measure import Idle, ServiceError, choose_slo, find_target
from load_tests.scenario import SloRule

IDLE = [Idle({"chat": 0.2, "long": 3.0}, 0.05), Idle({"chat": 0.1, "long": 4.0}, 0.04)]


def test_bounds_are_multiples_of_the_fastest_idle_system():
    slo = choose_slo(SloRule(), IDLE)
    assert slo.ttft_s == pytest.approx({"chat": 0.3, "long": 9.0})
    assert slo.itl_s == pytest.approx(0.08)
    assert slo.itl_quantile == 0.95


def test_bounds_in_seconds_take_the_place_of_multiples():
    slo = choose_slo(SloRule(ttft_s={"long": 2.5}, itl_s=0.1, itl_quantile=None), IDLE)
    assert slo.ttft_s == pytest.approx({"chat": 0.3, "long": 2.5})
    assert (slo.itl_s, slo.itl_quantile) == (0.1, None)


def test_a_service_that_does_not_answer_is_named():
    with pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:1/v1/models: .*refused.*does the service run there"):
        find_target("http://127.0.0.1:1/v1/")
