"""Rounds that others have disturbed do not count, and are played again."""

from dataclasses import replace
from pathlib import Path

import pytest

from app.local_process import RunFolder
from load_tests.samples import GeneratorHealth, Run, Sample
from tests.bench.cpu_use import CpuUse
from tests.bench.simulator.rounds import Round, Rounds, Use, UseWatch

QUIET, BUSY = Use({"others": 0.05}, 0.2, 2), Use({"others": 0.4}, 0.9, 2)
SAMPLE = Sample("small", "s", 0, 0.0, 0.0, 0.1, (), 0.2, 10, 2)
RUN = Run("small", "colocated", "", 1.0, 0, "", 0.0, 1.0, (SAMPLE,), GeneratorHealth({}, {}))


def played(uses: list[Use], rounds: Rounds, run: Run = RUN) -> list[str]:
    said: list[str] = []
    rounds.play(lambda number: Round(run, uses[number], ()), said.append)
    return said


def test_a_round_that_others_have_disturbed_is_played_again():
    rounds = Rounds(wanted=2, allowed=5)
    said = played([QUIET, BUSY, QUIET, QUIET], rounds)
    assert [line.rpartition("; ")[2] for line in said] == [
        "counts",
        "others used 0.40 cores, more than 0.15",
        "counts",
    ]
    assert (len(rounds.clean), len(rounds.spoilt), rounds.problems) == (2, 1, [])


def test_without_enough_rounds_that_count_there_is_no_measurement():
    rounds = Rounds(wanted=2, allowed=3)
    played([BUSY, QUIET, BUSY], rounds)
    assert rounds.problems == ["1 of 3 rounds had the machine for themselves, 2 are needed"]


def test_a_failed_request_spoils_a_round():
    failed = replace(RUN, samples=(replace(SAMPLE, error="unfinished"),))
    assert Round(failed, QUIET, ()).problems == ["1 requests failed"]


@pytest.mark.parametrize(("others_s", "words"), [(0.5, []), (3.0, ["others used 0.60 cores for 5 s, more than 0.50"])])
def test_a_few_seconds_of_somebody_else_spoil_a_round_of_a_minute(others_s: float, words: list[str]):
    at_s, used_s = 0.0, 0.0
    watch = UseWatch(RunFolder(Path()), lambda folder: CpuUse({"engine": at_s / 2}, used_s), lambda: at_s, 2)
    watch.look()
    for window in range(12):
        at_s += 5.0
        used_s += others_s if window == 7 else 0.0
        watch.look()
    at_s += 0.1  # as the round ends: by chance somebody ran just then
    used_s += 0.1
    watch.look()
    assert watch.use.problems == words
    assert watch.use.mean["engine"] == pytest.approx(0.5)
