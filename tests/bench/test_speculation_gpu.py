"""The bounds of `bench_speculation_gpu`: of drafts that are as often right as is said, and as they really were."""

import numpy as np
import pytest

from tests.bench.bench_speculation_gpu import MAX_TOKENS, Run, bound, bound_by_luck, measured_tokens, steps_needed

COSTS = dict.fromkeys(range(1, MAX_TOKENS + 1), 1.0)


def test_a_step_draws_the_drafts_before_the_first_wrong_one_and_one_more_token() -> None:
    is_right = np.array([True, True, False, True, True, True, False, True])
    assert steps_needed(is_right, 1) == 8
    assert steps_needed(is_right, 2) == 5  # 2, 1, 2, 2, 1: the right ones pair with what is drawn behind them
    assert steps_needed(is_right, 4) == 3  # 3, 4, 1 of the last one


@pytest.mark.parametrize("chance", [0.6, 0.8])
def test_with_many_drafts_luck_evens_out(chance: float) -> None:
    run = Run(1, chance)
    run.note(np.random.default_rng(0).random(200_000) < chance)
    assert bound_by_luck(COSTS, run)[0] == pytest.approx(bound(COSTS, chance)[0], rel=0.01)


def test_luck_raises_the_bound_of_its_run_alone() -> None:
    run = Run(1, 0.6)
    run.note(np.ones(80, dtype=bool))
    assert bound_by_luck(COSTS, run) == (8.0, 8)
    run.note(np.zeros(80, dtype=bool))
    assert run.measured == 160
    assert bound_by_luck(COSTS, run)[0] == pytest.approx(160 / 90)


def test_a_small_batch_is_measured_for_longer() -> None:
    assert [measured_tokens(batch) for batch in (1, 8, 32, 128)] == [1000, 500, 200, 200]
