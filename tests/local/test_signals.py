"""A server that waits for its end hears of it, whichever of its threads the system tells. No Ray runs."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from app.local_server import wait_for_signal
from tests.local.commands import ROOT


class EndedError(Exception):
    """The handler ran."""


@pytest.fixture
def raising() -> Iterator[signal.Signals]:
    """A signal whose handler raises."""

    def handle(*_: object) -> None:
        raise EndedError

    before = signal.signal(signal.SIGUSR2, handle)
    yield signal.SIGUSR2
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.timeout(60)
def test_a_signal_that_another_thread_takes_ends_the_waiting(
    raising: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, sleep = threading.Event(), time.sleep

    def note_and_sleep(seconds: float) -> None:
        waits.set()
        sleep(seconds)

    monkeypatch.setattr("app.local_server.time.sleep", note_and_sleep)

    def take() -> None:
        waits.wait()
        signal.pthread_kill(threading.get_ident(), raising)

    taker = threading.Thread(target=take)
    with pytest.raises(EndedError):
        taker.start()
        wait_for_signal()
    taker.join()


_STOPS_WHAT_IT_STARTED = """
import signal, sys, time
from app.local_process import interrupt_once
interrupt_once()
try:
    print("started", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("stopping", flush=True)
    sys.stdin.readline()
    print("stopped", flush=True)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_keep_what_was_started_from_being_stopped(
    first: signal.Signals, second: signal.Signals
) -> None:
    heed_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [sys.executable, "-c", _STOPS_WHAT_IT_STARTED],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(first)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(second)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.read() == "stopped\n"
    assert process.returncode == 0
