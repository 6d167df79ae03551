"""What steps cost is learned from batches as they come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.planner.gap_learner import GapLearner

STEP_S, SEQUENCE_S, KV_S, TOKEN_S = 0.055, 1e-4, 5e-7, 2.4e-4


def learn(batches, kv_per_sequence=1000.0) -> GapLearner:
    learner = GapLearner()
    for batch in batches:
        kv = batch * kv_per_sequence
        learner.add(batch, kv, STEP_S + SEQUENCE_S * batch + KV_S * kv, seconds=2.0)
    return learner


@given(st.lists(st.integers(1, 200), min_size=8, max_size=40))
def test_gaps_within_what_was_seen_are_told_within_a_tenth(batches):
    curve = learn([1, 200, *batches]).curve(TOKEN_S, 1000.0)
    assert curve is not None
    for batch in (1, 20, 100, 200):
        assert curve.seconds(batch) == pytest.approx(STEP_S + SEQUENCE_S * batch + KV_S * batch * 1000, rel=0.1)


def test_batches_that_were_all_alike_are_not_taken_to_cost_all_by_sequence():
    curve = learn([10] * 50).curve(TOKEN_S, 1000.0)
    assert curve is not None
    assert curve.seconds(10) == pytest.approx(STEP_S + 10 * (SEQUENCE_S + KV_S * 1000), rel=0.05)
    assert curve.step_s > 0.6 * STEP_S
    assert curve.batch_within(1.0) == pytest.approx(20)  # beyond which nothing is said


def test_large_batches_are_still_known_after_an_hour_of_small_ones():
    learner = learn([150] * 10)
    for _ in range(1800):
        learner.add(4, 4000, STEP_S + 4 * (SEQUENCE_S + KV_S * 1000), seconds=2.0)
        learner.pass_time(2.0)
    curve = learner.curve(TOKEN_S, 1000.0)
    assert curve is not None
    assert curve.seconds(150) == pytest.approx(STEP_S + 150 * (SEQUENCE_S + KV_S * 1000), rel=0.1)


def test_longer_contexts_make_a_sequence_cost_more():
    learner = GapLearner()
    for kv_per_sequence in (500, 12_000):
        for batch in (4, 8, 16, 30):
            kv = batch * kv_per_sequence
            learner.add(batch, kv, STEP_S + SEQUENCE_S * batch + KV_S * kv, seconds=10.0)
    short, long = learner.curve(TOKEN_S, 500.0), learner.curve(TOKEN_S, 12_000.0)
    assert short is not None and long is not None
    assert long.sequence_s > 5 * short.sequence_s


def test_of_steps_that_were_not_seen_nothing_is_told():
    learner = GapLearner()
    learner.add(0, 0, 0.1, 1.0)
    assert learner.curve(0.0, 1.0) is None and learner.costs(TOKEN_S) is None
    learner = learn([5])
    learner.pass_time(100 * 3600.0)
    assert learner.curve(0.0, 1.0) is None and learner.costs(TOKEN_S) is None


def test_while_steps_have_computed_prompts_alone_sequences_are_taken_to_cost_what_prompt_tokens_do():
    curve = GapLearner().curve(TOKEN_S, kv_per_sequence=4600.0)
    assert curve is not None
    assert curve.seconds(4) == pytest.approx(4 * (TOKEN_S + 10 * TOKEN_S))
    assert curve.batch_within(1100 * TOKEN_S) == pytest.approx(100)


def test_before_contexts_have_grown_the_kv_of_long_ones_is_counted_in():
    learner = GapLearner()
    learner.add(1, 200, STEP_S, seconds=2.0)
    curve = learner.curve(TOKEN_S, kv_per_sequence=12_000.0)
    assert curve is not None
    assert curve.sequence_s == pytest.approx(TOKEN_S + 12_000 * TOKEN_S / 460, rel=0.2)
