"""The plan of a storm: as many faults as asked for, of every kind, and one at a time that costs a pool a replica."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.chaos.storm import ENGINE_POOLS, SPACING_S, Kind, Pool, plan_storm

seeds = st.integers(0, 10_000)
durations_s = st.floats(50.0, 1200.0)
counts = st.integers(1, 120)


@given(seeds, durations_s, counts)
def test_a_storm_has_as_many_faults_as_asked_for_in_order_and_in_time(seed, duration_s, num_faults):
    plan = plan_storm(seed, duration_s, num_faults)
    assert len(plan) == num_faults
    assert plan == sorted(plan, key=lambda fault: fault.at_s)
    assert all(0 <= fault.at_s <= duration_s and 0 <= fault.pick < 1 for fault in plan)


@given(seeds, durations_s, counts)
def test_no_pool_is_planned_to_lack_two_replicas_at_once(seed, duration_s, num_faults):
    plan = plan_storm(seed, duration_s, num_faults)
    for pool in Pool:
        own = [fault for fault in plan if fault.pool is pool and fault.is_disruptive]
        for fault, later in pairwise(own):
            assert later.at_s - fault.at_s >= SPACING_S[pool] + fault.seconds


@given(seeds, durations_s, counts)
def test_every_scaling_up_is_followed_by_one_down_before_the_next(seed, duration_s, num_faults):
    plan = plan_storm(seed, duration_s, num_faults)
    for pool in ENGINE_POOLS:
        scalings = [
            fault.kind for fault in plan if fault.pool is pool and fault.kind in (Kind.SCALE_UP, Kind.SCALE_DOWN)
        ]
        assert scalings == [(Kind.SCALE_UP, Kind.SCALE_DOWN)[i % 2] for i in range(len(scalings))]


@given(seeds)
def test_ten_minutes_hold_sixty_faults_of_every_kind_on_both_pools(seed):
    plan = plan_storm(seed, 600.0, 60)
    assert {fault.kind for fault in plan} >= set(Kind) - {Kind.SCALE_DOWN}
    for pool in ENGINE_POOLS:
        kinds = {fault.kind for fault in plan if fault.pool is pool}
        assert {Kind.ENGINE_KILL, Kind.REPLICA_KILL, Kind.TRANSFER_DELAY} <= kinds


def test_the_same_seed_plans_the_same_storm_and_another_seed_another():
    assert plan_storm(1, 600.0, 60) == plan_storm(1, 600.0, 60) != plan_storm(2, 600.0, 60)


def test_engines_die_in_pools_of_engines_and_clients_have_no_pool():
    for fault in plan_storm(3, 1200.0, 120):
        assert (fault.pool is None) == (fault.kind is Kind.DISCONNECT)
        assert (fault.pool is Pool.INGRESS) == (fault.kind is Kind.INGRESS_KILL)


def test_a_storm_without_time_to_recover_is_refused():
    with pytest.raises(ValueError, match="45 s is too short"):
        plan_storm(1, 45.0, 5)
