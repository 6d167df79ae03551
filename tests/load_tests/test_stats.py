"""Figures against values worked out by hand."""

import pytest

from load_tests.samples import Run
from load_tests.stats import Slo, Summary, attainment, class_stats, goodput, goodput_ratio, itl_ratio
from tests.load_tests.runs import DURATION_S, WARMUP_S, build_run, build_sample

SLO = Slo({"chat": 0.5, "long": 3.0}, itl_s=0.12)
MEAN_SLO = Slo(SLO.ttft_s, SLO.itl_s, itl_quantile=None)
# One stall among 20 gaps: their 95% quantile and their mean are both 0.145 s.
STALLED = [0.1] * 19 + [1.0]


def build_rounds(
    gap_s: float, per_second: int = 1, rounds: tuple[int, ...] = (0, 1), deployment: str = "colocated"
) -> list[Run]:
    """Runs with evenly spaced requests, each of two gaps."""
    starts = [WARMUP_S + i / per_second for i in range(int(DURATION_S) * per_second)]
    return [
        build_run([build_sample(sent_s=at, ttft_s=0.1, gaps_s=[gap_s] * 2) for at in starts], deployment, round=number)
        for number in rounds
    ]


def test_percentiles_are_those_of_the_sorted_values():
    summary = Summary.of([float(value) for value in reversed(range(1, 102))])
    assert summary == Summary(101, 51.0, {50: 51.0, 90: 91.0, 95: 96.0, 99: 100.0})


def test_percentiles_between_two_values_are_interpolated():
    summary = Summary.of([0.0, 1.0])
    assert summary is not None
    assert summary.percentiles == pytest.approx({50: 0.5, 90: 0.9, 95: 0.95, 99: 0.99})


def test_nothing_has_no_summary():
    assert Summary.of([]) is None


def test_a_class_is_put_together_from_all_runs():
    first = build_run([build_sample(ttft_s=0.2, gaps_s=[0.1, 0.3]), build_sample("long", gaps_s=[])])
    second = build_run([build_sample(ttft_s=0.4, gaps_s=[0.2])])
    stats = class_stats([first, second], "chat")
    assert stats.num_requests == 2
    assert (stats.prompt_tokens, stats.output_tokens) == (80, 5)
    assert stats.prompt_to_output == pytest.approx(16.0)
    assert stats.ttft and stats.itl and stats.tpot and stats.e2e
    assert stats.ttft.mean == pytest.approx(0.3)
    assert (stats.itl.n, stats.tpot.n) == (3, 2)
    assert (stats.itl.mean, stats.tpot.mean) == pytest.approx((0.2, 0.2))
    assert stats.e2e.mean == pytest.approx(0.6)


def test_failures_are_counted_by_kind_and_have_no_end_to_end():
    failed = [build_sample(ttft_s=9.0, error="HTTP 503"), build_sample(ttft_s=None, gaps_s=[], error="timeout")]
    stats = class_stats([build_run([build_sample(ttft_s=0.2), *failed, failed[0]])], "chat")
    assert stats.num_requests == 4
    assert stats.errors == {"HTTP 503": 2, "timeout": 1}
    assert stats.ttft is not None
    assert stats.ttft.n == 3, "a late first token is seen"
    assert stats.ttft.mean == pytest.approx((0.2 + 9.0 + 9.0) / 3)


def test_where_nothing_was_generated_there_is_no_ratio_of_tokens():
    failed = build_sample(ttft_s=None, gaps_s=[], error="timeout")
    stats = class_stats([build_run([failed])], "chat")
    assert stats.prompt_to_output is None
    assert stats.ttft is stats.itl is stats.tpot is stats.e2e is None


def test_gaps_in_the_window_count_though_their_request_began_before_it():
    run = build_run([build_sample(sent_s=WARMUP_S - 1.0, ttft_s=0.5, gaps_s=[0.2, 0.4])])
    stats = class_stats([run], "chat")
    assert stats.num_requests == 0
    assert stats.itl is not None
    assert (stats.itl.n, stats.itl.mean) == (1, 0.4)


@pytest.mark.parametrize(
    ("sample", "meets_quantile", "meets_mean"),
    [
        (build_sample(ttft_s=0.5, gaps_s=[0.12]), True, True),  # on the bound is within it
        (build_sample(ttft_s=0.51), False, False),
        (build_sample("long", ttft_s=0.51), True, True),  # a bound of its own
        (build_sample(gaps_s=STALLED), False, False),
        (build_sample(gaps_s=[*STALLED, 0.1, 0.1]), True, False),  # the quantile leaves one of 22 out: 0.1
        (build_sample(gaps_s=[0.05] * 8 + [0.2] * 2), False, True),  # 0.2 and 0.08: a mean hides stalls
        (build_sample(gaps_s=[]), True, True),
        (build_sample(error="timeout"), False, False),
        (build_sample(ttft_s=None, gaps_s=[]), False, False),
    ],
)
def test_a_good_request_finished_and_kept_both_bounds(sample, meets_quantile, meets_mean):
    assert SLO.is_met(sample) == meets_quantile
    assert MEAN_SLO.is_met(sample) == meets_mean


def test_goodput_is_good_requests_of_the_steady_state_per_second():
    good, bad = build_sample(), build_sample(ttft_s=2.0)
    warmup = build_sample(sent_s=WARMUP_S - 1.0)
    runs = [build_run([good] * 6 + [bad] * 2 + [warmup]), build_run([good] * 2, duration_s=2 * DURATION_S)]
    assert goodput(runs, SLO) == pytest.approx(8 / (3 * DURATION_S))


def test_attainment_is_the_share_of_good_requests():
    runs = [build_run([build_sample(), build_sample(ttft_s=2.0)]), build_run([build_sample("long")] * 2)]
    assert attainment(runs, SLO) == pytest.approx(0.75)
    assert attainment(runs, SLO, "chat") == pytest.approx(0.5)
    assert attainment(runs, SLO, "other") is None


def test_identical_sides_have_a_ratio_of_1():
    runs = build_rounds(0.1)
    for ratio in (goodput_ratio(runs, runs, SLO), itl_ratio(runs, runs, "chat")):
        assert (ratio.value, ratio.low, ratio.high, ratio.probability_above_1) == (1.0, 1.0, 1.0, 0.0)


def test_a_clearly_better_side_is_better_in_every_resample():
    ratio = goodput_ratio(build_rounds(0.1, per_second=2), build_rounds(0.1, deployment="other"), SLO)
    assert (ratio.value, ratio.low, ratio.high, ratio.probability_above_1) == (2.0, 2.0, 2.0, 1.0)
    ratio = itl_ratio(build_rounds(0.4), build_rounds(0.1, deployment="other"), "chat")
    assert (ratio.value, ratio.probability_above_1) == pytest.approx((4.0, 1.0))


def test_an_interval_holds_the_ratio_of_all_samples():
    above = [*build_rounds(0.1, rounds=(0,)), *build_rounds(0.2, rounds=(1,))]  # good in one round only
    ratio = goodput_ratio(above, build_rounds(0.1), SLO)
    assert ratio.value == pytest.approx(0.5)
    assert 0.0 <= ratio.low < 0.5 < ratio.high <= 1.0


def test_rounds_are_paired_in_whatever_order_they_come():
    runs = [*build_rounds(0.1, rounds=(0,)), *build_rounds(0.2, rounds=(1,))]
    assert goodput_ratio(runs, runs[::-1], SLO).high == 1.0


def test_unequal_rounds_are_refused():
    with pytest.raises(ValueError, match="only runs of the same rounds compare"):
        goodput_ratio(build_rounds(0.1), build_rounds(0.1, rounds=(0,)), SLO)


def test_no_goodput_on_either_side_is_a_tie():
    nothing = [build_run()]
    assert goodput_ratio(nothing, nothing, SLO).value == 1.0
    assert goodput_ratio(build_rounds(0.1, rounds=(0,)), nothing, SLO).value == float("inf")


def test_a_stall_that_no_percentile_of_the_gaps_shows_is_seen_in_the_longest_gap_of_each_request():
    stalled = build_sample(gaps_s=[0.1] * 199 + [4.0])
    stats = class_stats([build_run([stalled] * 3, duration_s=60.0)], "chat")
    assert stats.itl is not None and stats.itl.percentiles[99] == pytest.approx(0.1)
    assert stats.longest_gap is not None and (stats.longest_gap.n, stats.longest_gap.mean) == (3, 4.0)
