"""What is asked over a line and answered there, between two ends in this process; links that the test looks into."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.errors import TransferError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.group import Group
from deployments.kv_transfer.inquiries import Answers, Arrival, Inquiries
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Job, LinkLostError, Steps
from tests.waiting import wait_until

PATIENCE_S = 30.0


class FakeLink:
    """Takes down what is submitted; a receive is over when the test says so."""

    def __init__(self) -> None:
        self.name = "test"
        self.submitted: list[tuple[Any, Future[Tensor | None]]] = []
        self.closed: list[str] = []
        self.is_in_doubt = False

    def submit(self, job: Job) -> "Future[Tensor | None]":
        if self.is_in_doubt:
            raise TransferError("the other engine has not answered")
        self.submitted.append((job, Future()))
        return self.submitted[-1][1]

    @property
    def names(self) -> list[str]:
        """Of the chunks that are moved, in order."""
        return [job.args[0] for job, _ in self.submitted]

    def close(self, reason: str, kind: type[TransferError] = TransferError) -> None:
        self.closed.append(reason)


def move(name: str, group: Group, config: TransferConfig) -> Steps:
    """Never run here."""
    yield True
    return None


class Held:
    """The chunks of a source: notes by name; a test finishes them, or takes chunks away."""

    def __init__(self) -> None:
        self.notes: dict[str, Future[str]] = {}

    def add(self, name: str) -> "Future[str]":
        self.notes[name] = Future()
        return self.notes[name]

    def note_of(self, object_id: str) -> "Future[str] | None":
        return self.notes.get(object_id)

    def sending_of(self, object_id: str) -> Job | None:
        return partial(move, object_id) if object_id in self.notes else None


class Ends:
    """Both ends of a line, with a thread each."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.line, self.source_line = Line(ours), Line(theirs)
        self.link, self.source_link, self.held = FakeLink(), FakeLink(), Held()
        self.inquiries = Inquiries()

    def open(self) -> None:
        link: Any = self.link
        source_link: Any = self.source_link
        Thread(target=Answers(source_link, self.source_line, self.held).run, daemon=True).start()
        self.inquiries.begin(link, self.line)

    def ask(self, name: str, *, is_sent: bool = False) -> Arrival:
        return self.inquiries.ask(name, partial(move, name) if is_sent else None)

    def close(self) -> None:
        self.line.close()
        self.source_line.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_a_chunk_may_be_asked_for_before_the_link_stands_and_before_it_is_complete(ends):
    note = ends.held.add("early")
    arrival = ends.ask("early")
    ends.open()
    assert ends.ask("gone").exception(PATIENCE_S) is not None, "the source listens, and has had the first question"
    assert not arrival.done()
    completed_s = time.monotonic()
    note.set_result("first token")
    *found, complete_s = arrival.result(PATIENCE_S)
    assert found == [None, "first token"]
    assert completed_s <= complete_s <= time.monotonic(), "not when it was asked for"


def test_answers_come_in_the_order_in_which_chunks_are_complete(ends):
    ends.open()
    notes = [ends.held.add(name) for name in "abc"]
    arrivals = [ends.ask(name) for name in "abc"]
    for i in (2, 0, 1):
        notes[i].set_result(str(i))
        assert arrivals[i].result(PATIENCE_S)[:2] == (None, str(i))


def test_what_is_sent_is_begun_in_one_order_on_both_ends(ends):
    ends.open()
    arrivals = {name: ends.ask(name, is_sent=True) for name in "abcd" if ends.held.add(name)}
    for name in "cadb":
        ends.held.notes[name].set_result(name)
    wait_until(lambda: len(ends.link.submitted) == 4, PATIENCE_S)
    assert ends.source_link.names == ends.link.names and set(ends.link.names) == set("abcd")
    for job, received in ends.link.submitted:
        received.set_result(torch.full((1,), float(ord(job.args[0]))))
    for name, arrival in arrivals.items():
        tensor, note, _ = arrival.result(PATIENCE_S)
        assert tensor is not None and (float(tensor), note) == (float(ord(name)), name)


def test_whoever_asks_for_a_chunk_that_is_gone_or_never_complete_is_told(ends):
    ends.open()
    note = ends.held.add("dropped")
    arrivals = [ends.ask("dropped"), ends.ask("dropped", is_sent=True), ends.ask("stranger")]
    assert "no longer has it" in str(arrivals[2].exception(PATIENCE_S))
    note.cancel()
    for arrival in arrivals[:2]:
        assert "no longer has it" in str(arrival.exception(PATIENCE_S))
    assert ends.source_link.submitted == [], "nothing is sent"


def test_a_chunk_that_was_released_before_it_is_complete_is_not_sent(ends):
    ends.open()
    note = ends.held.add("released")
    arrival = ends.ask("released", is_sent=True)
    ends.ask("stranger").exception(PATIENCE_S)
    del ends.held.notes["released"]
    note.set_result("")
    assert "no longer has it" in str(arrival.exception(PATIENCE_S))


def test_an_answer_to_a_question_that_was_given_up_ends_the_link(ends):
    ends.open()
    note = ends.held.add("late")
    arrival = ends.ask("late", is_sent=True)
    ends.ask("stranger").exception(PATIENCE_S)
    ends.inquiries.fail(TransferError, "the other engine has not answered")
    with pytest.raises(TransferError, match="has not answered"):
        arrival.result(PATIENCE_S)
    note.set_result("")
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)
    assert ends.link.submitted == [], "its bytes are not taken for those of another chunk"


def test_what_is_sent_while_the_source_is_in_doubt_ends_the_link(ends):
    """It answers again, and has sent it: the next receive would be given this message."""
    ends.open()
    ends.held.add("a")
    ends.link.is_in_doubt = True
    arrival = ends.ask("a", is_sent=True)
    ends.held.notes["a"].set_result("")
    with pytest.raises(TransferError, match="has not answered"):
        arrival.result(PATIENCE_S)
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)


def test_questions_end_with_the_link_also_those_to_come(ends):
    ends.open()
    ends.held.add("a")
    open_question = ends.ask("a")
    ends.source_line.close()
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)
    ends.inquiries.end(LinkLostError, "over")
    for arrival in (open_question, ends.ask("b")):
        with pytest.raises(LinkLostError, match="over"):
            arrival.result(PATIENCE_S)
