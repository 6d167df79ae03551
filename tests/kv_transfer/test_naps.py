"""How promptly threads that poll wake up."""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.kv_transfer.naps import nap_exactly
from tests.kv_transfer.threads import slack_ns


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of Linux")
def test_naps_of_the_calling_thread_alone_become_exact() -> None:
    before = slack_ns()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(nap_exactly).result()
        assert thread.submit(slack_ns).result() == 1
    assert slack_ns() == before > 1


def test_a_system_that_knows_no_such_thing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    nap_exactly()
