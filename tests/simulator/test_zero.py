"""Modelled services of which the decode pool sleeps while nobody comes: the product's own hold has requests wait."""

from dataclasses import replace

import pytest

from deployments.load.held import Held, HoldBounds
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.planner.settings import PlannerSettings
from deployments.simulator.curves import Curves
from deployments.simulator.pools import PoolSetup, PoolState
from deployments.simulator.requests import Request
from deployments.simulator.scaling import Planned, ServeDefault
from deployments.simulator.service import Scaler, Service, Setup

CURVES = Curves(step_s=0.01, token_s=1e-4, sequence_s=1e-3, context_s=0.0, max_num_seqs=4)
START_S, HOLD_S, NIGHT_S = 20.0, 30.0, 600.0
POOL = PoolSetup(CURVES, START_S, least=0, most=4)
SETUP = Setup(POOL, POOL, ttft_s=60.0, itl_s=0.1)
SETTINGS = PlannerSettings(enabled=True, ttft_s=2.0, itl_s=0.1, hold_s=HOLD_S, start_s=START_S)


def morning(count: int, setup: Setup = SETUP, scaler: Scaler | None = None) -> tuple[Service, list[Request]]:
    """One request in the evening, and so many at once after a night."""
    requests = [Request(1.0, 200, 20), *(Request(NIGHT_S, 200, 20) for _ in range(count))]
    service = Service(setup, scaler or Planned(SETTINGS, is_colocated=setup.prefill is None))
    service.play(requests)
    return service, requests


def counts(service: Service, pool: str, since_s: float, until_s: float) -> set[int]:
    """How many replicas of a pool served in a while."""
    return {ready for at_s, _, ready in service.pools[pool].history if since_s <= at_s < until_s}


@pytest.mark.parametrize("is_colocated", [False, True], ids=["apart", "colocated"])
def test_a_pool_sleeps_while_nobody_comes_costs_nothing_then_and_is_woken_by_one_that_is_held(is_colocated: bool):
    service, (first, second) = morning(1, replace(SETUP, prefill=None) if is_colocated else SETUP)
    decode = service.pools["decode"]
    assert counts(service, "decode", NIGHT_S / 2, NIGHT_S) == {0}
    assert decode.gpu_s < NIGHT_S / 4
    assert first.ttft_s is not None and first.ttft_s < 1.0, "the first replica starts with the service"
    assert second.ttft_s is not None and START_S <= second.ttft_s < START_S + 5.0
    assert second.end_s is not None and service.held.count == 0


def test_as_many_replicas_are_woken_as_those_that_are_held_need_and_the_first_one_gets_no_more_than_its_seats():
    service, requests = morning(12)
    wanted = [target for at_s, target, _ in service.pools["decode"].history if NIGHT_S <= at_s < NIGHT_S + 3]
    assert max(wanted) > 1
    assert all(request.end_s is not None for request in requests)
    served = [replica.engine.stats.finished for replica in service.pools["decode"].replicas.values()]
    assert sum(served) == 12 and max(served) <= 8


def test_more_than_may_wait_are_refused_and_one_that_waits_too_long_is_given_up():
    _, requests = morning(5, replace(SETUP, hold=HoldBounds(3, 600.0)))
    assert [request.is_refused for request in requests] == [False, False, False, False, True, True]
    service, requests = morning(2, replace(SETUP, hold=HoldBounds(9, START_S / 2)))
    assert [request.is_refused for request in requests] == [False, True, True]
    assert service.held.count == 0


def test_one_that_finds_no_replica_as_the_last_one_goes_has_one_started_as_ray_serve_does():
    class Sleeps(ServeDefault):
        """Has a replica while a request is there, and no longer."""

        def decide(
            self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int, held: Held
        ) -> dict[str, int]:
            decode = pools[DECODE]
            return {DECODE: int(decode.num_ready > 0 and decode.num_ongoing > 0), PREFILL: 0}

    service, (first, second) = morning(1, scaler=Sleeps())
    assert first.end_s is not None and second.ttft_s is not None
    assert START_S <= second.ttft_s < START_S + 5.0 and service.held.count == 0
