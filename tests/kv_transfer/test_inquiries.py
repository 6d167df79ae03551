"""What is asked over a line and answered there, between two ends in this process; links that the test looks into."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.engine.handoff.outgoing import End, Part, Told, Word
from deployments.errors import TransferError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.group import Group
from deployments.kv_transfer.inquiries import Announced, Answer, Answers, Heard, Inquiries, Want
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Job, LinkLostError, Steps
from deployments.messages import ChunkReady
from tests.waiting import wait_until

PATIENCE_S = 30.0
HERE, AWAY = 0, 1  # chunks with these numbers lie where the receiver can read them, and where it cannot


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
        """Of the parts that are moved, in order."""
        return [job.args[0] for job, _ in self.submitted]

    def close(self, reason: str, kind: type[TransferError] = TransferError) -> None:
        self.closed.append(reason)


def move(name: str, group: Group, config: TransferConfig) -> Steps:
    """Never run here."""
    yield True
    return None


def part_of(name: str, number: int) -> Part:
    return Part(ChunkReady(name, number, 0, 1), torch.zeros(1))


class Held:
    """The hand-offs of a source, by name; a test tells of them, or takes them away. Their notes are their names."""

    def __init__(self) -> None:
        self.told: dict[str, Told] = {}
        self.released: list[tuple[str, int]] = []
        self.is_sound = True

    def add(self, *names: str) -> None:
        for name in names:
            self.told[name] = lambda word: None

    def watch(self, object_id: str, told: Told) -> bool:
        if object_id in self.told:
            self.told[object_id] = told
        return object_id in self.told

    def release(self, object_id: str, index: int) -> None:
        self.released.append((object_id, index))

    def describe(self, object_id: str, part: Part) -> tuple[str, bool] | None:
        if not self.is_sound:
            raise ValueError("no chunk")
        return (object_id, part.chunk.index == HERE) if object_id in self.told else None

    def sending_of(self, part: Part) -> Job:
        return partial(move, part.chunk.request_id)


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

    def ask(self, name: str, want: Want = Want.LOOK) -> "SimpleQueue[Heard]":
        heard: SimpleQueue[Heard] = SimpleQueue()
        self.inquiries.ask(want, name, heard.put, lambda note: partial(move, note))
        return heard

    def tell(self, name: str, word: Word | int) -> None:
        """That a chunk of this number is complete, or the end; once the source has been asked."""
        self.held.told[name](part_of(name, word) if isinstance(word, int) else word)

    def settle(self) -> None:
        """Return when the source has had all questions that came before."""
        assert hear(self.ask("stranger")) is Answer.GONE

    def close(self) -> None:
        self.line.close()
        self.source_line.close()


def hear(heard: "SimpleQueue[Heard]") -> Heard:
    return heard.get(timeout=PATIENCE_S)


def hear_note(heard: "SimpleQueue[Heard]") -> str:
    found = hear(heard)
    assert isinstance(found, Announced)
    return found.note


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def test_a_hand_off_may_be_asked_for_before_the_link_stands_and_before_it_is_complete(ends):
    ends.held.add("early")
    heard = ends.ask("early")
    ends.open()
    ends.settle()
    assert heard.empty()
    completed_s = time.monotonic()
    ends.tell("early", HERE)
    found = hear(heard)
    assert isinstance(found, Announced) and (found.note, found.arriving) == ("early", None)
    assert completed_s <= found.complete_s <= time.monotonic(), "not when it was asked for"


def test_parts_are_told_of_as_they_are_complete_and_then_the_end(ends):
    ends.open()
    ends.held.add(*"abc")
    heard = {name: ends.ask(name) for name in "abc"}
    ends.settle()
    for name in "cabac":
        ends.tell(name, HERE)
        assert hear_note(heard[name]) == name
    assert ends.inquiries.are_open
    for name in "abc":
        ends.tell(name, End.WHOLE)
        assert hear(heard[name]) is Answer.WHOLE
    assert not ends.inquiries.are_open


def test_what_is_sent_is_begun_in_one_order_on_both_ends(ends):
    ends.open()
    ends.held.add(*"abcd")
    heard = {name: ends.ask(name, Want.SEND) for name in "abcd"}
    ends.settle()
    for name in "cadbac":
        ends.tell(name, HERE)
    wait_until(lambda: len(ends.link.submitted) == 6, PATIENCE_S)
    assert ends.source_link.names == ends.link.names == list("cadbac")
    for job, received in ends.link.submitted:
        received.set_result(torch.full((1,), float(ord(job.args[0]))))
    for name in "cadbac":
        found = hear(heard[name])
        assert isinstance(found, Announced) and found.arriving is not None
        tensor = found.arriving.result()
        assert tensor is not None and (float(tensor), found.note) == (float(ord(name)), name)


def test_what_cannot_be_read_where_it_is_is_sent_when_the_rest_is_asked_for(ends):
    ends.open()
    ends.held.add("a")
    looks = ends.ask("a")
    ends.settle()
    ends.tell("a", AWAY)
    ends.tell("a", HERE)
    assert hear(looks) is Answer.AWAY
    assert hear_note(looks) == "a" and ends.link.submitted == []
    rest = ends.ask("a", Want.REST)
    ends.settle()
    ends.tell("a", HERE)
    ends.tell("a", AWAY)
    assert isinstance(hear(rest), Announced) and rest.empty()
    assert ends.source_link.names == ends.link.names == ["a"]


def test_whoever_asks_for_what_is_gone_or_never_complete_is_told(ends):
    ends.open()
    ends.held.add("dropped")
    heard = [ends.ask("dropped"), ends.ask("stranger")]
    assert hear(heard[1]) is Answer.GONE
    ends.tell("dropped", End.GONE)
    assert hear(heard[0]) is Answer.GONE
    assert ends.source_link.submitted == [], "nothing is sent"


@pytest.mark.parametrize("is_let_go", [True, False], ids=["let go", "no chunk"])
def test_what_was_let_go_before_it_is_complete_or_is_no_chunk_is_not_sent(ends, is_let_go):
    ends.open()
    ends.held.add("a")
    heard = ends.ask("a", Want.SEND)
    ends.settle()
    told = ends.held.told["a"]
    if is_let_go:
        del ends.held.told["a"]
    ends.held.is_sound = is_let_go
    told(part_of("a", HERE))
    assert hear(heard) is Answer.GONE and ends.source_link.submitted == []
    told(End.WHOLE)
    ends.settle()
    assert ends.link.closed == [], "an end that is said twice harms nobody"


def test_chunks_are_given_back_by_name(ends):
    ends.inquiries.release("early", 1)  # to nobody, without harm
    ends.open()
    ends.inquiries.release("a", 3)
    ends.inquiries.release("with/slash", 4)
    wait_until(lambda: len(ends.held.released) == 2, PATIENCE_S)
    assert ends.held.released == [("a", 3), ("with/slash", 4)]


@pytest.mark.parametrize("want", [Want.SEND, Want.LOOK])
def test_an_answer_to_a_question_that_was_given_up_ends_the_link(ends, want):
    ends.open()
    ends.held.add("late")
    heard = ends.ask("late", want)
    ends.settle()
    ends.inquiries.fail(TransferError, "the other engine has not answered")
    assert "has not answered" in str(hear(heard))
    ends.tell("late", HERE)
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)
    assert ends.link.submitted == [], "its bytes are not taken for those of another chunk"


def test_what_is_sent_while_the_source_is_in_doubt_ends_the_link(ends):
    """It answers again, and has sent it: the next receive would be given this message."""
    ends.open()
    ends.held.add("a")
    heard = ends.ask("a", Want.SEND)
    ends.settle()
    ends.link.is_in_doubt = True
    ends.tell("a", HERE)
    assert "has not answered" in str(hear(heard))
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)


def test_questions_end_with_the_link_also_those_to_come(ends):
    ends.open()
    ends.held.add("a")
    open_question = ends.ask("a")
    ends.source_line.close()
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)
    ends.inquiries.end(LinkLostError, "over")
    for heard in (open_question, ends.ask("b")):
        found = hear(heard)
        assert isinstance(found, LinkLostError) and str(found) == "over"


def test_nonsense_ends_the_link(ends):
    ends.open()
    ends.held.add("a")
    heard = ends.ask("a")
    ends.source_line.say("0 nonsense - ")
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)
    assert heard.empty()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_goes_wrong_in_a_thread_that_listens_ends_the_link(ends, monkeypatch):
    """Else those that have asked would wait for ever."""

    def breaks(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(ends.held, "watch", breaks)
    monkeypatch.setattr(ends.inquiries, "_pass_on", breaks)
    ends.open()
    ends.ask("a")
    wait_until(lambda: bool(ends.source_link.closed), PATIENCE_S)
    ends.source_line.say(f"0 {Answer.GONE} - ")
    wait_until(lambda: bool(ends.link.closed), PATIENCE_S)
