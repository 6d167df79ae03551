"""As many drafts are tried as bring the most tokens per second, and none where they bring less than none would."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments.engine.speculation.acceptance import Acceptance
from deployments.engine.speculation.curve import StepCurve
from deployments.engine.speculation.lengths import Guess, choose_lengths


def memory_bound(num_tokens: int) -> float:
    """A step takes the same up to 16 tokens, and then as much more as it has more."""
    return max(16, num_tokens) / 16


def compute_bound(num_tokens: int) -> float:
    return float(num_tokens)


def test_where_tokens_cost_nothing_more_all_likely_drafts_are_tried() -> None:
    assert choose_lengths([Guess(0.9, 6), Guess(0.5, 2)], 2, memory_bound) == [6, 2]


def test_where_each_token_costs_its_share_none_is_tried() -> None:
    assert choose_lengths([Guess(0.99, 8)], 1, compute_bound) == [0]
    assert choose_lengths([Guess(0.8, 8)] * 16, 16, memory_bound) == [0] * 16


def test_the_likeliest_drafts_go_first_where_not_all_fit() -> None:
    few, many = choose_lengths([Guess(0.4, 8), Guess(0.95, 8)], 8, memory_bound)
    assert few < many and few + many == 8


def test_unlikely_drafts_are_not_tried_though_they_cost_nothing() -> None:
    assert choose_lengths([Guess(0.01, 8)], 1, memory_bound) == [0]


def test_no_step_gets_longer_than_it_may() -> None:
    assert choose_lengths([Guess(0.99, 32)], 1, memory_bound, max_step_s=1.0) == [15]


def test_where_a_guess_takes_as_long_as_a_step_none_is_made() -> None:
    assert choose_lengths([Guess(0.9, 8)], 1, memory_bound, lambda num_sequences: 1.0) == [0]
    assert choose_lengths([Guess(0.9, 8)], 1, memory_bound, lambda num_sequences: 0.01) == [8]


def test_guesses_of_all_sequences_at_once_are_worth_more_than_one_after_the_other() -> None:
    guesses = [Guess(0.7, 1)] * 4
    assert choose_lengths(guesses, 4, memory_bound, lambda num_sequences: 0.4) == [1] * 4
    assert choose_lengths(guesses, 4, memory_bound, lambda num_sequences: 0.4 * num_sequences) == [0] * 4


def test_the_time_of_guesses_counts_for_how_long_a_step_may_take() -> None:
    assert choose_lengths([Guess(0.99, 8)], 1, memory_bound, lambda n: 0.1, max_step_s=1.35) == [3]


def value(lengths: tuple[int, ...], guesses: list[Guess], num_sequences: int, draft_s: float) -> float:
    right = sum(guess.rate**place for guess, n in zip(guesses, lengths, strict=True) for place in range(1, n + 1))
    step_s = memory_bound(num_sequences + sum(lengths)) + draft_s * max(lengths, default=0)
    return (num_sequences + right) / step_s


@given(
    st.lists(st.builds(Guess, st.floats(0.3, 0.95), st.integers(0, 3)), max_size=3),
    st.integers(3, 20),
    st.sampled_from([0.0, 0.01]),
)
def test_no_other_choice_promises_more(guesses: list[Guess], num_sequences: int, draft_s: float) -> None:
    chosen = tuple(choose_lengths(guesses, num_sequences, memory_bound, lambda num_rows: draft_s))
    choices = itertools.product(*(range(guess.max_drafts + 1) for guess in guesses))
    best = max(value(lengths, guesses, num_sequences, draft_s) for lengths in choices)
    # What promises hardly more than nothing, and drafts that are hardly ever right, are left out.
    assert value(chosen, guesses, num_sequences, draft_s) >= best / 1.05


def test_drafts_are_as_likely_right_as_those_of_their_kind_were_and_their_sequences() -> None:
    acceptance = Acceptance(2)
    assert acceptance.rate("r", 0) == acceptance.rate("r", 1) == 0.5
    for _ in range(100):
        acceptance.add("other", 1, num_right=4, num_drafts=4)
        acceptance.add("liar", 1, num_right=0, num_drafts=4)
    assert acceptance.rate("r", 0) == 0.5
    assert acceptance.rate("r", 1) == pytest.approx(0.8, abs=0.1), "four right for each that was wrong"
    assert acceptance.rate("liar", 1) < 0.2 < 0.9 < acceptance.rate("other", 1)
    acceptance.drop("liar")
    assert acceptance.rate("liar", 1) == acceptance.rate("r", 1)


def test_what_a_step_takes_is_learned_and_sizes_that_were_not_run_are_taken_to_be_cheap() -> None:
    curve = StepCurve()
    assert curve.seconds(4) == 0 and not curve.is_known(4)
    for _ in range(20):
        curve.add(1, 0.010)
        curve.add(8, 0.020)
    assert curve.seconds(1) == pytest.approx(0.010) and curve.seconds(8) == pytest.approx(0.020)
    assert curve.seconds(4) == pytest.approx(0.010), "no less than a smaller step, and perhaps no more"
    assert curve.seconds(500) == pytest.approx(0.020)
    curve.add(4, 0.015)
    assert curve.seconds(4) == pytest.approx(0.015)
    curve.add(1, 10.0)
    assert curve.seconds(1) < 0.011, "one step that was held up says little"


def test_what_was_not_seen_for_long_is_forgotten_and_found_out_again() -> None:
    curve = StepCurve()
    curve.add(1, 0.010)
    curve.add(8, 5.0)
    assert curve.is_known(8)
    for _ in range(2000):
        curve.add(1, 0.010)
    assert not curve.is_known(8) and curve.seconds(8) == pytest.approx(0.010)


def test_no_more_drafts_are_chosen_than_a_step_holds() -> None:
    curve = StepCurve(max_tokens=12)
    curve.add(8, 0.010)
    lengths = choose_lengths([Guess(0.9, 6), Guess(0.8, 6)], 8, curve.seconds)
    assert sum(lengths) == 4 and lengths[0] > lengths[1] > 0, "the likeliest of them"
