"""Messages between two ends, and what ends the wait for them."""

import errno
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from deployments.kv_transfer.line import Line, LineHost, call
from tests.waiting import PATIENCE_S

HOST = "127.0.0.1"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def pair() -> Iterator[tuple[Line, Line]]:
    ends = [Line(end) for end in socket.socketpair()]
    yield ends[0], ends[1]
    for end in ends:
        end.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Line]]:
    """A line, and the bare connection at its other end."""
    near, far = socket.socketpair()
    with near:
        line = Line(far)
        yield near, line
        line.close()


def test_messages_arrive_one_by_one_however_the_bytes_do(raw):
    near, far = raw
    near.sendall(b"first\nsecond\nthi")
    assert [far.hear(PATIENCE_S), far.hear(PATIENCE_S)] == ["first", "second"]
    near.sendall(b"rd\n")
    assert far.hear(PATIENCE_S) == "third"


def test_silence_is_bounded_and_the_line_goes_on(raw):
    near, far = raw
    near.sendall(b"la")
    with pytest.raises(TimeoutError, match=r"after 0\.01 s"):
        far.hear(0.01)
    near.sendall(b"te\n")
    assert far.hear(PATIENCE_S) == "late"


def test_what_one_end_says_the_other_hears(pair):
    near, far = pair
    near.say("first")
    near.say("second")
    assert [far.hear(PATIENCE_S), far.hear(PATIENCE_S)] == ["first", "second"]


@pytest.mark.parametrize("closes", [0, 1])
def test_closing_either_end_wakes_who_listens(pair, pool, closes):
    heard = pool.submit(pair[1].hear)
    pair[closes].close()
    assert heard.result(PATIENCE_S) is None
    pair[closes].close()


def test_saying_to_an_end_that_is_gone_raises(pair):
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        pair[0].say("anyone?")


def test_a_flood_without_an_end_is_hung_up_on(pair):
    pair[0].say("x" * 10_000)  # its end comes too late
    assert pair[1].hear(PATIENCE_S) is None


def test_who_does_not_know_the_secret_gets_no_line(pool):
    with LineHost(HOST, "secret") as host:
        waiting: Future[Line] = pool.submit(host.wait, PATIENCE_S)
        wrong, silent = call(host.address, "guess", PATIENCE_S), socket.create_connection(host.address)
        assert wrong.hear(PATIENCE_S) is None, "hung up on"
        right = call(host.address, "secret", PATIENCE_S)
        near = waiting.result(PATIENCE_S)
        right.say("hello")
        assert near.hear(PATIENCE_S) == "hello"
        for end in (wrong, right, near):
            end.close()
        silent.close()


def test_waiting_for_nobody_is_bounded():
    with LineHost(HOST, "secret") as host, pytest.raises(TimeoutError):
        host.wait(0.05)
    with pytest.raises(ConnectionRefusedError):
        call(host.address, "secret", PATIENCE_S)


def test_strangers_who_call_and_call_do_not_make_the_wait_longer():
    with LineHost(HOST, "secret") as host:
        strangers = [socket.create_connection(host.address) for _ in range(5)]
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            host.wait(0.3)
        assert time.monotonic() - begun < 3.0, "each of the five could keep it waiting for a second"
        for stranger in strangers:
            stranger.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems name fewer bounds")
def test_the_systems_of_both_ends_notice_a_path_that_is_gone(pool):
    with LineHost(HOST, "secret") as host:
        waiting = pool.submit(host.wait, PATIENCE_S)
        ends = call(host.address, "secret", PATIENCE_S), waiting.result(PATIENCE_S)
    for end in ends:
        connection = end._connection
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT
        assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [4, 2, 3, 10_000]
        end.close()


def test_a_path_that_is_gone_ends_a_line_and_is_no_silence_that_was_bounded(monkeypatch):
    class Gone:
        """A connection that the system gives up."""

        def settimeout(self, timeout_s: float | None) -> None:
            pass

        def recv(self, _: int) -> bytes:
            raise OSError(errno.ETIMEDOUT, "Connection timed out")  # a TimeoutError

    gone: Any = Gone()
    assert Line(gone).hear() is Line(gone).hear(PATIENCE_S) is None


def test_many_questions_are_answered_in_order(pair):
    near, far = pair

    def answer() -> None:
        while (question := far.hear()) is not None:
            far.say(f"{question}!")

    thread = threading.Thread(target=answer)
    thread.start()
    for i in range(1000):
        near.say(str(i))
        assert near.hear(PATIENCE_S) == f"{i}!"
    near.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
