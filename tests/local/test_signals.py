"""A server that waits for its end hears of it, whichever of its threads the system tells. No Ray runs."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from app.local_server import wait_for_signal


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
