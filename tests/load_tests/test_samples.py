"""What counts as measured, and that raw data comes back from its file as it was."""

from dataclasses import replace
from pathlib import Path

import pytest

from load_tests.samples import read_runs, write_runs
from tests.load_tests.runs import DURATION_S, WARMUP_S, build_run, build_sample, synthetic_run

END_S = WARMUP_S + DURATION_S


def test_end_to_end_begins_when_a_request_is_sent():
    assert build_sample(sent_s=12.0, ttft_s=0.5, gaps_s=[0.25, 0.25]).e2e_s == pytest.approx(1.0)


def test_a_failed_request_has_no_end_to_end_time():
    assert build_sample(error="timeout").e2e_s is None


def test_time_per_token_counts_tokens_not_chunks():
    sample = replace(build_sample(gaps_s=[0.3, 0.3]), output_tokens=7)  # two or three tokens came at once
    assert sample.tpot_s == pytest.approx(0.1)


@pytest.mark.parametrize("gaps_s", [[], [0.1]])
def test_one_token_has_no_time_per_token(gaps_s):
    assert replace(build_sample(gaps_s=gaps_s), output_tokens=1).tpot_s is None


def test_gaps_end_one_after_the_other_from_the_first_token_on():
    ends = list(build_sample(sent_s=1.0, ttft_s=0.5, gaps_s=[0.25, 0.5]).gap_ends_s())
    assert ends == [(1.75, 0.25), (2.25, 0.5)]


def test_a_request_without_a_first_token_has_no_gaps():
    assert list(build_sample(ttft_s=None, gaps_s=[], error="timeout").gap_ends_s()) == []


def test_a_request_that_was_never_sent_counts_when_it_was_planned():
    unsent = replace(build_sample(sent_s=12.0), sent_s=None, ttft_s=None, gaps_s=(), end_s=None, error="not sent")
    assert unsent.start_s == 12.0
    assert build_run([unsent]).measured() == [unsent]


def test_the_steady_state_has_its_first_instant_and_not_its_last():
    run = build_run()
    assert [run.in_window(at) for at in (WARMUP_S - 0.01, WARMUP_S, END_S - 0.01, END_S)] == [False, True, True, False]


def test_requests_count_by_when_they_began():
    samples = [build_sample(sent_s=at, gaps_s=[3.0]) for at in (WARMUP_S - 1, WARMUP_S + 1, END_S - 1, END_S + 1)]
    assert [sample.start_s for sample in build_run(samples).measured()] == [WARMUP_S + 1, END_S - 1]


def test_gaps_count_by_when_they_ended():
    before = build_sample(sent_s=WARMUP_S - 2.0, ttft_s=1.0, gaps_s=[0.5, 0.75])  # ends before and in the window
    after = build_sample(sent_s=END_S - 2.0, ttft_s=1.0, gaps_s=[0.25, 0.8])  # ends in the window and after it
    assert build_run([before, after]).gaps_s("chat") == [0.75, 0.25]


def test_classes_are_told_apart_and_keep_their_order():
    run = build_run([build_sample("long"), build_sample("chat"), build_sample("long")])
    assert run.classes() == ["long", "chat"]
    assert len(run.measured("long")) == 2
    assert len(run.gaps_s("chat")) == 2


def test_a_run_with_a_problem_is_invalid():
    assert build_run().is_valid
    assert not build_run(problems=["requests were sent late"]).is_valid


def test_raw_data_comes_back_from_its_file_as_it_was(tmp_path: Path):
    unsent = replace(build_sample(), planned_s=3.0, sent_s=None, ttft_s=None, gaps_s=(), end_s=None, error="not sent")
    runs = [synthetic_run(), build_run([unsent], problems=["late"], server={"preemptions": 2.0})]
    about = {"command": "python -m load_tests.run", "versions": {"python": "3.11"}}
    write_runs(tmp_path / "samples.json", runs, about)
    assert read_runs(tmp_path / "samples.json") == (runs, about)
