"""Whoever waits for a benchmark hears how far it is, on stderr, and nothing once it is over."""

import threading

import pytest

from tests.bench.progress import timed
from tests.waiting import wait_until


def test_what_takes_long_says_how_much_of_it_has_passed_until_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    told = ""

    def has_told_twice() -> bool:
        nonlocal told
        told += capsys.readouterr().err
        return told.count("\n") >= 2

    with timed("storm", 600.0, every_s=0.005):
        wait_until(has_told_twice)
    assert told.splitlines()[0] == "storm: 0 of about 600 s"
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(tell)")]
    assert capsys.readouterr().out == ""
