"""Who computes a prompt: what speaks for decode, what for prefill, and that one threshold says it for any cache."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments.routing.crossover import Crossover, Gaps, Goals, Here, There, risk_here, risk_there

GOALS = Goals(ttft_s=1.0, itl_s=0.05)
MEASURED = Crossover(GOALS)
TOKEN_S = 25e-6
GAPS = Gaps(num_new_tokens=200, step_s=0.0055, sequence_s=1e-5)
IDLE = Here(TOKEN_S, 0.0, 0.0, 8192)
BUSY = Here(TOKEN_S, 0.0, 32.0, 8192)
amounts = st.floats(0, 1e4)


def there(num_tokens: int, queued_tokens: float = 0.0, handoff_s: float = 0.01) -> There:
    return There((num_tokens + queued_tokens) * TOKEN_S, handoff_s)


@pytest.mark.parametrize("num_tokens", [10, 1000, 20_000])
def test_an_idle_decode_engine_computes_prompts_itself(num_tokens: int) -> None:
    assert not MEASURED.is_remote(num_tokens, IDLE, there(num_tokens), GAPS)


def test_a_busy_one_leaves_them_to_prefill_unless_that_is_busier_or_far_away() -> None:
    assert MEASURED.is_remote(1500, BUSY, there(1500), GAPS)
    assert not MEASURED.is_remote(1500, BUSY, there(1500, queued_tokens=40_000), GAPS)
    assert not MEASURED.is_remote(1500, BUSY, there(1500, handoff_s=5.0), GAPS)
    assert not MEASURED.is_remote(10, BUSY, there(10), GAPS), "less to compute than to hand over"


def test_late_gaps_are_let_happen_as_long_as_few_are_late() -> None:
    waits = there(3000, queued_tokens=25_000)
    assert not MEASURED.is_remote(3000, BUSY, waits, replace(GAPS, late_share=0.005))
    assert MEASURED.is_remote(3000, BUSY, waits, replace(GAPS, late_share=0.05))
    assert MEASURED.is_remote(3000, BUSY, waits, replace(GAPS, late_share=0.9)), "else it would stay so"
    assert MEASURED.is_remote(3000, BUSY, waits, replace(GAPS, num_new_tokens=10)), "of 10 gaps none may be late"


def test_what_is_set_holds_whatever_was_measured() -> None:
    fixed = Crossover(GOALS, 256)
    assert fixed.is_remote(256, IDLE, there(256), GAPS) and not fixed.is_remote(255, BUSY, there(255), GAPS)
    assert fixed.threshold(10_000, IDLE, there(10_000), GAPS) == fixed.default_tokens == 256


@given(st.integers(1, 30_000), amounts, st.floats(0, 64), amounts, st.floats(0, 1), st.floats(0, 0.2))
def test_the_threshold_says_what_was_decided(
    num_tokens: int, queued: float, num_sequences: float, queued_there: float, handoff_s: float, late_share: float
) -> None:
    here = Here(TOKEN_S, queued, num_sequences, 8192)
    remote, gaps = there(num_tokens, queued_there, handoff_s), replace(GAPS, late_share=late_share)
    threshold = MEASURED.threshold(num_tokens, here, remote, gaps)
    assert MEASURED.is_remote(num_tokens, here, remote, gaps) == (num_tokens >= threshold)
    if threshold > 1:
        assert not MEASURED.is_remote(threshold - 1, here, remote, gaps)


@given(st.integers(1, 30_000), amounts, st.floats(0, 64), st.floats(0, 1e4))
def test_more_to_compute_or_to_wait_for_is_never_less_of_a_risk(
    num_tokens: int, queued: float, num_sequences: float, more: float
) -> None:
    here = Here(TOKEN_S, queued, num_sequences, 8192)
    worse = Here(TOKEN_S, queued + more, num_sequences, 8192)
    least = risk_here(num_tokens, here, GAPS, GOALS)
    assert risk_here(num_tokens, worse, GAPS, GOALS) >= least
    assert risk_here(num_tokens + 1, here, GAPS, GOALS) >= least
    assert risk_there(num_tokens, there(num_tokens, queued + more), GAPS, GOALS) >= risk_there(
        num_tokens, there(num_tokens, queued), GAPS, GOALS
    )
