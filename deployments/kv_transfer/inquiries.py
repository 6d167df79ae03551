"""What a receiver asks a source over a link's line: to tell it of a hand-off, part by part, and to send it.

A hand-off is asked for once, long before it is computed. The source answers for each part as soon as that is complete,
and says in the end that it was all, or that the rest is gone. Whoever hears or says an answer never waits: answers are
given by whoever completes a part, and what is sent is begun by the link.

The invariant of what is sent: **both ends begin the messages of a link in one order**, for a group pairs them by it.
The source submits a message and says so under one lock, which gives it its place: 0, 1, 2 and so on. The receiver
submits a receive for each answer, in the order in which it hears them, and none for anything else. An answer with
another place than the next one ends the link, and so does a message that one end has failed or given up (`Link`).

A question is `number what object`, an answer `number answer place note`; what is not sent has no place, `-`. A chunk is
given back with `- release object/chunk`, which nobody answers.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import count
from threading import Lock, Thread
from typing import Protocol, TypeAlias

from torch import Tensor

from deployments.engine.handoff.outgoing import End, Part, Told, Word
from deployments.errors import TransferError
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Job, Link, LinkLostError

logger = logging.getLogger(__name__)


class Want(StrEnum):
    """What is asked of a hand-off."""

    LOOK = "look"  # say which parts are complete: they are read where they are, if that can be
    SEND = "send"  # send all parts
    REST = "rest"  # send those that cannot be read where they are
    RELEASE = "release"  # nothing: a chunk is given back


class Answer(StrEnum):
    """What the source says; it is the last of a question if it says why nothing more comes."""

    HERE = "here"  # a part is complete, and lies where it can be read
    SENT = "sent"  # a part is complete, and on its way
    AWAY = "away"  # a part is complete, and lies where it cannot be read: the rest may be asked for
    WHOLE = End.WHOLE.value
    GONE = End.GONE.value


_LAST = (Answer.WHOLE, Answer.GONE)
_NOWHERE = "-"


@dataclass(frozen=True, slots=True)
class Announced:
    """A part is complete.

    Attributes:
        note: what the source says of it.
        complete_s: monotonic time when it was said.
        arriving: its KV, which is on its way; None: it is where the note says.
    """

    note: str
    complete_s: float
    arriving: "Future[Tensor | None] | None"


# `Answer` without those that announce something; an error instead of the last one.
Heard: TypeAlias = Announced | Answer | TransferError


@dataclass(frozen=True, slots=True)
class _Open:
    question: str
    hear: Callable[[Heard], None]
    receive: Callable[[str], Job]


class Inquiries:
    """Of one link, on the side of the receiver. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._numbers = count()
        self._open: dict[int, _Open] = {}
        self._line: Line | None = None
        self._next_place = count()
        self._ended: tuple[type[TransferError], str] | None = None

    @property
    def are_open(self) -> bool:
        return bool(self._open)

    def ask(self, want: Want, object_id: str, hear: Callable[[Heard], None], receive: Callable[[str], Job]) -> None:
        """Ask for a hand-off, now or as soon as the link stands.

        Args:
            want: what is to become of it.
            object_id: its name at the source.
            hear: told of each part, and of the end, in order and from any thread; must not block.
            receive: what is done when the source sends a part of which it says this.
        """
        with self._lock:
            number = next(self._numbers)
            inquiry = _Open(f"{number} {want} {object_id}", hear, receive)
            if self._ended is None:
                self._open[number] = inquiry
            ended, line = self._ended, self._line
        if ended is not None:
            kind, reason = ended
            hear(kind(reason))
        elif line is not None:
            with suppress(OSError):  # whoever listens to it sees its end
                line.say(inquiry.question)

    def release(self, object_id: str, index: int) -> None:
        """Give a chunk back; said in vain if the link is lost, or does not stand yet."""
        if (line := self._line) is not None:
            with suppress(OSError):
                line.say(f"{_NOWHERE} {Want.RELEASE} {object_id}/{index}")

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
            inquiry.hear(kind(reason))

    def end(self, kind: type[TransferError], reason: str) -> None:
        """As `fail`, and for those to come."""
        with self._lock:
            self._ended = kind, reason
        self.fail(kind, reason)

    def _listen(self, link: Link, line: Line) -> None:
        try:
            self._hear_answers(link, line)
        except ValueError:  # it talks nonsense
            pass
        finally:  # whatever else may happen: nobody would hear what those wait for that have asked
            link.close("the source closed the link", LinkLostError)

    def _hear_answers(self, link: Link, line: Line) -> None:
        while (answer := line.hear()) is not None:
            number, word, place, note = answer.split(" ", 3)
            if place != _NOWHERE and int(place) != next(self._next_place):
                link.close(f"the source has sent message {place} out of turn")
                return
            with self._lock:
                inquiry = self._open.pop(int(number), None) if word in _LAST else self._open.get(int(number))
            if inquiry is not None:
                self._pass_on(inquiry, Answer(word), note, link)
            elif word not in _LAST:
                # It was given up, and the source may send it all the same: what comes next would be taken for it.
                link.close("the source answered too late", LinkLostError)
                return
            # Else this name would keep the hand-off until the next answer comes.
            del inquiry

    def _pass_on(self, inquiry: _Open, word: Answer, note: str, link: Link) -> None:
        complete_s = time.monotonic()
        if word is Answer.HERE:
            inquiry.hear(Announced(note, complete_s, None))
        elif word is not Answer.SENT:
            inquiry.hear(word)
        else:
            try:
                arriving = link.submit(inquiry.receive(note))
            except TransferError as error:
                inquiry.hear(type(error)(str(error)))
                # It was sent all the same, and the next receive would be given it.
                link.close(f"what was sent cannot be received: {error}", LinkLostError)
            else:
                inquiry.hear(Announced(note, complete_s, arriving))


class Handoffs(Protocol):
    """What a source has given away, by name. Safe from any thread."""

    def watch(self, object_id: str, told: Told) -> bool:
        """Be told of a hand-off; False: it is gone."""
        ...

    def release(self, object_id: str, index: int) -> None:
        """A chunk is given back. Unknown ones are no error."""
        ...

    def describe(self, object_id: str, part: Part) -> tuple[str, bool] | None:
        """What is said of a part, and whether others can read it where it is; None: it is gone.

        Raises:
            ValueError: it is no KV of this engine.
        """
        ...

    def sending_of(self, part: Part) -> Job:
        """How a part is sent."""
        ...


class Answers:
    """Of one link, on the side of the source.

    Args:
        link: what is to be sent goes over it.
        line: of the link.
        handoffs: that may be asked for.
    """

    def __init__(self, link: Link, line: Line, handoffs: Handoffs) -> None:
        self._link = link
        self._line = line
        self._handoffs = handoffs
        self._order = Lock()
        self._next_place = count()

    def run(self) -> None:
        """Answer until the receiver closes the link."""
        try:
            self._answer_all()
        except (OSError, ValueError):  # the receiver is gone, or talks nonsense
            pass
        finally:
            self._link.close("the receiver closed the link")

    def _answer_all(self) -> None:
        while (question := self._line.hear()) is not None:
            number, want, name = question.split(" ", 2)
            if want == Want.RELEASE:
                object_id, _, index = name.rpartition("/")
                self._handoffs.release(object_id, int(index))
            else:
                tell = partial(self._tell, number, Want(want), name)
                if not self._handoffs.watch(name, tell):
                    tell(End.GONE)

    def _tell(self, number: str, want: Want, object_id: str, word: Word) -> None:
        """Say what has become of a hand-off. From any thread; must not raise."""
        try:
            with self._order:
                if isinstance(word, Part):
                    self._announce(number, want, object_id, word)
                else:
                    self._line.say(f"{number} {word} {_NOWHERE} ")
        except (OSError, TransferError):
            self._link.close("the receiver closed the link")

    def _announce(self, number: str, want: Want, object_id: str, part: Part) -> None:
        """Under the lock that gives what is sent its place."""
        try:
            # Only now: a chunk is not kept for the sake of a question.
            described = self._handoffs.describe(object_id, part)
        except ValueError:
            logger.exception("%s is not handed over", part.chunk)
            described = None
        if described is None:
            self._line.say(f"{number} {Answer.GONE} {_NOWHERE} ")
            return
        note, is_here = described
        if want is Want.LOOK:
            self._line.say(f"{number} {Answer.HERE if is_here else Answer.AWAY} {_NOWHERE} {note}")
        elif want is Want.SEND or not is_here:
            self._link.submit(self._handoffs.sending_of(part))
            self._line.say(f"{number} {Answer.SENT} {next(self._next_place)} {note}")
