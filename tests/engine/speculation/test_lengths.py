"""As many drafts are tried as bring the most tokens per second, and none where they bring less than none would."""

import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from deployments.engine.speculation.acceptance import Acceptance, Tried
from deployments.engine.speculation.curve import StepCurve
from deployments.engine.speculation.lengths import choose_lengths

Seconds = Callable[[int], float]
PADDED = (2, 4, 8, 16, 32, 64)


def padded(guesses: list[list[float]]) -> np.ndarray:
    """A row of each, with 0 where there is no draft."""
    rates = np.zeros((len(guesses), max(map(len, guesses), default=0)))
    for row, guess in zip(rates, guesses, strict=True):
        row[: len(guess)] = guess
    return rates


def drafted_s(curve: StepCurve, num_tokens: int) -> float:
    return float(curve.drafted_seconds(np.array([num_tokens]))[0])


def memory_bound(num_tokens: int) -> float:
    """A step takes the same up to 16 tokens, and then as much more as it has more."""
    return max(16, num_tokens) / 16


def compute_bound(num_tokens: int) -> float:
    return float(num_tokens)


def choose(
    guesses: list[list[float]],
    num_sequences: int,
    seconds: Seconds,
    draft_s: Seconds = lambda num_sequences: 0.0,
    max_step_s: float | None = None,
) -> list[int]:
    plain_s, drafted_s = seconds(num_sequences), np.vectorize(seconds, otypes=[float])
    return choose_lengths(padded(guesses), num_sequences, plain_s, drafted_s, draft_s, max_step_s)


def test_where_tokens_cost_nothing_more_all_likely_drafts_are_tried() -> None:
    assert choose([[0.9] * 6, [0.5] * 2], 2, memory_bound) == [6, 2]


def test_where_each_token_costs_its_share_none_is_tried() -> None:
    assert choose([[0.99] * 8], 1, compute_bound) == [0]
    assert choose([[0.8] * 8] * 16, 16, memory_bound) == [0] * 16


def test_the_likeliest_drafts_go_first_where_not_all_fit() -> None:
    few, many = choose([[0.4] * 8, [0.95] * 8], 8, memory_bound)
    assert few < many and few + many == 8


def test_unlikely_drafts_are_not_tried_though_they_cost_nothing() -> None:
    assert choose([[0.01] * 8], 1, memory_bound) == [0]


def test_no_step_gets_longer_than_it_may() -> None:
    assert choose([[0.99] * 32], 1, memory_bound, max_step_s=1.0) == [15]


def test_where_a_guess_takes_as_long_as_a_step_none_is_made() -> None:
    assert choose([[0.9] * 8], 1, memory_bound, lambda num_sequences: 1.0) == [0]
    assert choose([[0.9] * 8], 1, memory_bound, lambda num_sequences: 0.01) == [8]


def test_guesses_of_all_sequences_at_once_are_worth_more_than_one_after_the_other() -> None:
    guesses = [[0.7] * 1] * 4
    assert choose(guesses, 4, memory_bound, lambda num_sequences: 0.4) == [1] * 4
    assert choose(guesses, 4, memory_bound, lambda num_sequences: 0.4 * num_sequences) == [0] * 4


def test_the_time_of_guesses_counts_for_how_long_a_step_may_take() -> None:
    assert choose([[0.99] * 8], 1, memory_bound, lambda n: 0.1, max_step_s=1.35) == [3]


def value(lengths: tuple[int, ...], guesses: list[list[float]], num_sequences: int, draft_s: float) -> float:
    right = sum(guess[0] ** place for guess, n in zip(guesses, lengths, strict=True) for place in range(1, n + 1))
    step_s = memory_bound(num_sequences + sum(lengths)) + draft_s * max(lengths, default=0)
    return (num_sequences + right) / step_s


@given(
    st.lists(st.builds(lambda rate, count: [rate] * count, st.floats(0.3, 0.95), st.integers(0, 3)), max_size=3),
    st.integers(3, 20),
    st.sampled_from([0.0, 0.01]),
)
def test_no_other_choice_promises_more(guesses: list[list[float]], num_sequences: int, draft_s: float) -> None:
    chosen = tuple(choose(guesses, num_sequences, memory_bound, lambda num_rows: draft_s))
    choices = itertools.product(*(range(len(guess) + 1) for guess in guesses))
    best = max(value(lengths, guesses, num_sequences, draft_s) for lengths in choices)
    # What promises hardly more than nothing, and drafts that are hardly ever right, are left out.
    assert value(chosen, guesses, num_sequences, draft_s) >= best / 1.05


def test_drafts_are_as_likely_right_as_those_of_their_kind_were_and_their_sequences() -> None:
    acceptance = Acceptance(2)

    def rate(request_id: str, kind: int) -> float:
        return float(acceptance.rates([request_id], [kind], [1])[0, 0])

    assert rate("r", 0) == rate("r", 1) == 0.5
    for _ in range(100):
        acceptance.add([Tried("other", 1, num_right=4, num_drafts=4)])
        acceptance.add([Tried("liar", 1, num_right=0, num_drafts=4)])
    assert rate("r", 0) == 0.5
    assert rate("r", 1) == pytest.approx(0.5, abs=0.1), "at the first place every second one was wrong"
    assert acceptance.rates(["r"], [1], [4])[0, 3] > 0.9, "and none behind a right one"
    assert rate("liar", 1) < 0.2 < 0.9 < rate("other", 1)
    acceptance.drop("liar")
    assert rate("liar", 1) == rate("r", 1)


def test_guesses_that_get_worse_from_place_to_place_are_known_to() -> None:
    acceptance = Acceptance(1)
    for number in range(300):
        acceptance.add([Tried("r", 0, num_right=3 if number % 10 else 0, num_drafts=6)])
    (rates,) = acceptance.rates(["r"], [0], [8])
    assert rates[0] == pytest.approx(0.9, abs=0.1) and rates[1] > 0.9 and rates[2] > 0.9 and rates[3] < 0.1
    assert rates[6] == rates[7], "of places that were never tried nothing else is known"


def test_what_a_step_takes_is_learned_and_padded_sizes_that_were_not_run_are_taken_to_be_cheap() -> None:
    curve = StepCurve(512, PADDED)
    assert drafted_s(curve, 4) == 0 and not curve.is_known(4)
    for _ in range(20):
        curve.add(1, 0.010)
        curve.add(8, 0.020, has_drafts=True)
    assert curve.seconds(1) == pytest.approx(0.010) and drafted_s(curve, 8) == pytest.approx(0.020)
    assert drafted_s(curve, 4) == pytest.approx(0.010), "no less than a smaller step, and perhaps no more"
    assert drafted_s(curve, 500) == pytest.approx(0.020)
    for _ in range(3):
        curve.add(4, 0.015, has_drafts=True)
    assert drafted_s(curve, 4) == pytest.approx(0.015)
    curve.add(1, 10.0)
    assert curve.seconds(1) < 0.013, "one step that was held up says little"


def test_a_first_step_that_waits_for_something_condemns_neither_its_size_nor_those_above() -> None:
    curve = StepCurve()
    for _ in range(20):
        curve.add(1, 0.010)
    for seconds in (0.5, 0.4):
        curve.add(4, seconds, has_drafts=True)
        assert drafted_s(curve, 4) == drafted_s(curve, 8) == pytest.approx(0.010)
    curve.add(4, 0.013, has_drafts=True)
    assert drafted_s(curve, 4) == pytest.approx(0.013) and drafted_s(curve, 8) == pytest.approx(0.017)


def test_without_padding_sizes_lie_on_the_lines_through_those_that_were_run() -> None:
    curve = StepCurve(100)
    for size, seconds in ((8, 0.040), (24, 0.120), (48, 0.200)):
        for _ in range(3):
            curve.add(size, seconds, has_drafts=size > 8)
    assert [drafted_s(curve, size) for size in (8, 16, 36, 64)] == pytest.approx([0.04, 0.08, 0.16, 0.264])
    assert drafted_s(curve, 101) == math.inf


def test_by_how_much_steps_with_drafts_took_longer_than_expected_is_added_to_the_next_and_forgotten() -> None:
    curve = StepCurve(512, PADDED)
    for _ in range(3):
        curve.add(8, 0.010)
        curve.add(16, 0.020, has_drafts=True)
    before_s = drafted_s(curve, 32)
    for seconds in (0.023, 0.023, 0.0231):
        curve.add(16, seconds, has_drafts=True)
    assert drafted_s(curve, 32) > 1.1 * before_s and curve.seconds(8) == pytest.approx(0.010)
    for _ in range(1000):
        curve.add(8, 0.010)
    learned_s = drafted_s(curve, 16)
    assert 0.0200 < learned_s <= 0.0231 and drafted_s(curve, 32) == pytest.approx(learned_s, rel=0.01)


def test_steps_that_are_padded_to_one_size_are_one_and_those_without_drafts_are_not() -> None:
    curve = StepCurve(512, PADDED)
    for _ in range(3):
        curve.add(33, 0.010)
        curve.add(40, 0.014, has_drafts=True)
    assert drafted_s(curve, 35) == drafted_s(curve, 64) == pytest.approx(0.014)
    assert curve.seconds(33) == pytest.approx(0.010)


def test_what_was_not_seen_for_long_is_forgotten_and_found_out_again() -> None:
    curve = StepCurve()
    curve.add(1, 0.010)
    for _ in range(3):
        curve.add(8, 5.0)
    assert curve.is_known(8)
    for _ in range(5000):
        curve.add(1, 0.010)
    assert not curve.is_known(8) and drafted_s(curve, 8) == pytest.approx(0.010)


def test_no_more_drafts_are_chosen_than_a_step_holds() -> None:
    curve = StepCurve(max_tokens=12)
    curve.add(8, 0.010)
    lengths = choose_lengths(padded([[0.9] * 6, [0.8] * 6]), 8, curve.seconds(8), curve.drafted_seconds)
    assert sum(lengths) == 4 and lengths[0] > lengths[1] > 0, "the likeliest of them"
