"""What a receiver asks a source over a link's line: to say when a chunk is complete, and to send it then.

A question may be asked long before the chunk is computed, so answers come in any order. Whoever hears or says one never
waits: answers are given by whoever completes a chunk, and what is sent is begun by the link.

The invariant of what is sent: **both ends begin the messages of a link in one order**, for a group pairs them by it.
The source submits a message and says so under one lock, which gives it its place: 0, 1, 2 and so on. The receiver
submits a receive for each answer, in the order in which it hears them, and none for anything else. An answer with
another place than the next one ends the link, and so does a message that one end has failed or given up (`Link`).

A question is `number what object`, an answer `number answer place note`; what is not sent has no place, `-`.
"""

import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import count
from threading import Lock, Thread
from typing import Protocol, TypeAlias

from torch import Tensor

from deployments.errors import TransferError
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Job, Link, LinkLostError


class Want(StrEnum):
    """What is asked of a chunk."""

    LOOK = "look"  # say when it is complete: it is read where it is
    SEND = "send"


class Answer(StrEnum):
    """What the source says."""

    COMPLETE = "complete"  # and on its way, if it was to be sent
    GONE = "gone"


_NOWHERE = "-"
# The chunk, where it was sent, what came with it, and the monotonic time when it was said to be complete.
Arrival: TypeAlias = "Future[tuple[Tensor | None, str, float]]"


@dataclass(frozen=True, slots=True)
class _Open:
    question: str
    receive: Job | None
    arrival: Arrival


class Inquiries:
    """Of one link, on the side of the receiver. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._numbers = count()
        # Whoever takes one out of it finishes its future.
        self._open: dict[int, _Open] = {}
        self._line: Line | None = None
        self._next_place = count()
        self._ended: tuple[type[TransferError], str] | None = None

    @property
    def are_open(self) -> bool:
        return bool(self._open)

    def ask(self, object_id: str, receive: Job | None) -> Arrival:
        """Ask for a chunk, now or as soon as the link stands.

        Args:
            object_id: its name at the source.
            receive: what is done when the source sends it; None: it need not be sent.
        """
        arrival: Arrival = Future()
        with self._lock:
            number = next(self._numbers)
            question = f"{number} {Want.LOOK if receive is None else Want.SEND} {object_id}"
            if self._ended is None:
                self._open[number] = _Open(question, receive, arrival)
            ended, line = self._ended, self._line
        if ended is not None:
            kind, reason = ended
            arrival.set_exception(kind(reason))
        elif line is not None:
            with suppress(OSError):  # whoever listens to it sees its end
                line.say(question)
        return arrival

    def begin(self, link: Link, line: Line) -> None:
        """The link stands: say what was asked before, and listen."""
        with self._lock:
            self._line = line
            # Under the lock, so that nothing is said twice.
            with suppress(OSError):
                for inquiry in self._open.values():
                    line.say(inquiry.question)
        Thread(target=self._listen, args=(link, line), name=f"kv-line-{link.name}", daemon=True).start()

    def fail(self, kind: type[TransferError], reason: str) -> None:
        with self._lock:
            inquiries = list(self._open.values())
            self._open.clear()
        for inquiry in inquiries:
            # A new exception for each: one that was raised elsewhere has a traceback, and that pins tensors.
            inquiry.arrival.set_exception(kind(reason))

    def end(self, kind: type[TransferError], reason: str) -> None:
        """As `fail`, and for those to come."""
        with self._lock:
            self._ended = kind, reason
        self.fail(kind, reason)

    def _listen(self, link: Link, line: Line) -> None:
        while (answer := line.hear()) is not None:
            number, word, place, note = answer.split(" ", 3)
            if place != _NOWHERE and int(place) != next(self._next_place):
                link.close(f"the source has sent message {place} out of turn")
                return
            with self._lock:
                inquiry = self._open.pop(int(number), None)
            if inquiry is None:
                # It was given up, and the source may send it all the same: what comes next would be taken for it.
                link.close("the source answered too late")
                return
            self._settle(inquiry, word, note, link)
            # Else this name would keep the chunk until the next answer comes.
            del inquiry
        link.close("the source closed the link", LinkLostError)

    def _settle(self, inquiry: _Open, word: str, note: str, link: Link) -> None:
        arrival, complete_s = inquiry.arrival, time.monotonic()
        if word == Answer.GONE:
            arrival.set_exception(TransferError("the source no longer has it"))
        elif inquiry.receive is None:
            arrival.set_result((None, note, complete_s))
        else:
            try:
                received = link.submit(inquiry.receive)
            except TransferError as error:
                arrival.set_exception(type(error)(str(error)))
                # It was sent all the same, and the next receive would be given it.
                link.close(f"what was sent cannot be received: {error}", LinkLostError)
            else:
                received.add_done_callback(lambda done: _pass_on(done, note, complete_s, arrival))


def _pass_on(received: "Future[Tensor | None]", note: str, complete_s: float, arrival: Arrival) -> None:
    error = received.exception()
    if error is None:
        arrival.set_result((received.result(), note, complete_s))
    else:
        arrival.set_exception(error)


class Chunks(Protocol):
    """What a source has, by name. Safe from any thread."""

    def note_of(self, object_id: str) -> "Future[str] | None":
        """What comes with a chunk once it is complete; None: it is gone."""
        ...

    def sending_of(self, object_id: str) -> Job | None:
        """How a chunk is sent; None: it is gone."""
        ...


class Answers:
    """Of one link, on the side of the source.

    Args:
        link: what is to be sent goes over it.
        line: of the link.
        chunks: that may be asked for.
    """

    def __init__(self, link: Link, line: Line, chunks: Chunks) -> None:
        self._link = link
        self._line = line
        self._chunks = chunks
        self._order = Lock()
        self._next_place = count()

    def run(self) -> None:
        """Answer until the receiver closes the link."""
        with suppress(OSError, TransferError, ValueError):  # the receiver is gone, or talks nonsense
            while (question := self._line.hear()) is not None:
                number, want, object_id = question.split(" ", 2)
                if (note := self._chunks.note_of(object_id)) is None:
                    self._line.say(f"{number} {Answer.GONE} {_NOWHERE} ")
                else:
                    note.add_done_callback(partial(self._answer, number, want, object_id))
        self._link.close("the receiver closed the link")

    def _answer(self, number: str, want: str, object_id: str, note: "Future[str]") -> None:
        """A chunk is complete, or never will be. From any thread; must not raise."""
        # Only now: a chunk is not kept for the sake of a question.
        sending = None if note.cancelled() else self._chunks.sending_of(object_id)
        try:
            with self._order:
                if sending is None:
                    self._line.say(f"{number} {Answer.GONE} {_NOWHERE} ")
                    return
                place = _NOWHERE
                if want == Want.SEND:
                    self._link.submit(sending)
                    place = str(next(self._next_place))
                self._line.say(f"{number} {Answer.COMPLETE} {place} {note.result()}")
        except (OSError, TransferError):
            self._link.close("the receiver closed the link")
