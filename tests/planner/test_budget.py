"""How a budget that is too small is shared out, and how seldom that changes."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.planner.budget import Claim, Lean, affordable, share

HOLD_S = 60.0
PERIOD_S = 2.0


def claim(count: int, target: int, wanted: float, *, cost: float = 1.0, least: int = 1) -> Claim:
    return Claim(count, least, target, wanted, cost, HOLD_S)


class Shared:
    """Two pools that follow, decode's numbers first; a prefill replica costs two."""

    def __init__(self, budget: float, targets: tuple[int, int] = (1, 1)) -> None:
        self.budget, self.targets, self.history = budget, targets, [targets]
        self.lean: Lean | None = None
        self.now_s = 0.0

    def step(self, wanted: tuple[float, float]) -> None:
        decode = claim(4, self.targets[0], wanted[0])
        prefill = claim(4, self.targets[1], wanted[1], cost=2.0)
        self.targets, self.lean = share(decode, prefill, self.budget, self.lean, self.now_s)
        self.history.append(self.targets)
        self.now_s += PERIOD_S

    def run(self, seconds: float, wanted: tuple[float, float]) -> None:
        for _ in range(round(seconds / PERIOD_S)):
            self.step(wanted)


counts = st.integers(1, 12)
costs = st.floats(0.5, 4)


@given(counts, counts, counts, counts, costs, costs, st.floats(0, 20), st.floats(0, 20), st.floats(8, 30))
def test_neither_the_budget_nor_what_is_wanted_is_exceeded(
    decode, prefill, has_decode, has_prefill, decode_cost, prefill_cost, decode_wants, prefill_wants, budget
):
    claims = (
        claim(decode, has_decode, decode_wants, cost=decode_cost),
        claim(prefill, has_prefill, prefill_wants, cost=prefill_cost),
    )
    for lean in (None, Lean(True, -1e9), Lean(False, -1e9)):
        (num_decode, num_prefill), _ = share(*claims, budget, lean, 0.0)
        assert 1 <= num_decode <= decode and 1 <= num_prefill <= prefill
        assert num_decode * decode_cost + num_prefill * prefill_cost <= budget + 1e-6


@given(counts, counts, st.floats(0, 20), st.floats(0, 20), st.integers(2, 20))
def test_what_is_left_is_spent_at_once(decode, prefill, decode_wants, prefill_wants, budget):
    (num_decode, num_prefill), _ = share(
        claim(decode, 1, decode_wants), claim(prefill, 1, prefill_wants), budget, None, 0.0
    )
    assert num_decode + num_prefill == min(budget, decode + prefill)


def test_need_that_jumps_about_moves_no_replica_to_and_fro():
    shared, draw = Shared(budget=5.0), random.Random(0)
    for _ in range(900):
        # Between 3 + 1 and 1 + 2, either of which is better for some seconds.
        shared.step((3.0 * draw.uniform(0.6, 1.6), 2.0 * draw.uniform(0.6, 1.6)))
    assert shared.history[1] in ((3, 1), (1, 2))
    assert sum(before != after for before, after in pairwise(shared.history[1:])) == 0


@pytest.mark.parametrize(("wanted", "had", "gets"), [((1.0, 4.0), (3, 1), (1, 2)), ((4.0, 1.0), (1, 2), (3, 1))])
def test_a_replica_moves_once_that_was_better_for_as_long_as_one_is_held(wanted, had, gets):
    shared = Shared(budget=5.0, targets=had)
    shared.run(HOLD_S, wanted)
    assert shared.targets == had
    shared.run(PERIOD_S, wanted)
    assert shared.targets == gets
    shared.run(10 * HOLD_S, wanted)
    assert shared.targets == gets


def test_a_moment_in_which_it_is_good_as_it_is_begins_the_wait_anew():
    shared = Shared(budget=5.0, targets=(3, 1))
    for _ in range(5):
        shared.run(HOLD_S - PERIOD_S, (1.0, 4.0))
        shared.run(PERIOD_S, (3.0, 1.0))
    assert shared.targets == (3, 1)


def test_a_smaller_budget_is_kept_at_once():
    shared = Shared(budget=4.0, targets=(4, 3))
    shared.run(PERIOD_S, (4.0, 4.0))
    assert shared.targets == (2, 1)


def test_who_wants_nothing_is_left_what_it_has():
    shared = Shared(budget=5.0, targets=(3, 1))
    shared.run(3 * HOLD_S, (0.0, 0.0))
    assert shared.targets == (3, 1)


def test_the_only_pool_gets_what_can_be_paid_for_and_its_least_in_any_case():
    assert affordable(claim(9, 1, 9.0, cost=2.0), 7.0) == 3
    assert affordable(claim(2, 1, 9.0, cost=2.0), 7.0) == 2
    assert affordable(claim(9, 2, 9.0, cost=2.0, least=2), 1.0) == 2
