"""From a model's text to what it says and which tools it calls, while the text comes.

Owns that any text is read, however it is cut, and that what is no call is shown as the text that it is. Knows neither
tokens nor OpenAI's shapes; `answers.py` gives calls theirs.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto

from deployments.api.tools.call_reader import CallReader, Progress
from deployments.api.tools.families import Family

_WHITE_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is shown."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool is called; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of a call, as the model wrote them."""

    index: int
    text: str


Delta = Content | CallBegin | CallArguments


class _State(Enum):
    BARE = auto()  # nothing has come but white space, where a call needs no opening
    TEXT = auto()
    PLAIN = auto()  # text to the end
    OPENED = auto()  # behind an opening
    CALL = auto()
    BETWEEN = auto()  # behind a call, within the markers


class ToolParser:
    """Of one answer.

    Args:
        family: how the model writes calls.
        names: of the tools; a call of any other is text.
        max_calls: further ones are left out.
        are_alone: in an answer that begins with anything else no call is looked for.

    Attributes:
        num_calls: those that were told.
    """

    def __init__(
        self, family: Family, names: Collection[str], max_calls: int | None = None, *, are_alone: bool = False
    ) -> None:
        self._family = family
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._are_alone = are_alone
        self._state = _State.BARE if family.is_bare else _State.TEXT
        self._deltas: list[Delta] = []
        self._content: list[str] = []
        # What is held back: white space, then what may yet be a call or what surrounds it, then part of a marker.
        self._spaces: list[str] = []
        self._raw: list[str] = []
        self._marker = ""
        self._in_list = False
        self._follows_call = False
        self._reader: CallReader | None = None  # of a call
        self._is_begun = False
        self._is_wanted = True
        self.num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        """Take more text; return what is known by now."""
        start = 0
        while start < len(text):
            end = self._find_opening(text, start)
            if end > start:
                self._show(text[start:end])
            if end < len(text):
                self._push(text[end])
            start = end + 1
        return self._take()

    def flush(self) -> list[Delta]:
        """No more text will come: return what was held back. The last call may be incomplete."""
        if self._state is _State.BETWEEN:  # what closes a call is no text, be it incomplete
            self._raw.clear()
            self._marker = ""
        self._give_up()
        if not self._follows_call:
            self._content += self._spaces
        self._spaces.clear()
        return self._take()

    def _find_opening(self, text: str, start: int) -> int:
        """Where the next character stands that has to be looked at: within text those are few."""
        if self._state is _State.PLAIN:
            return len(text)
        if self._state is not _State.TEXT or self._marker:
            return start
        end = text.find(self._family.opening[0], start)
        return len(text) if end < 0 else end

    def _push(self, character: str) -> None:
        match self._state:
            case _State.TEXT:
                self._push_text(character)
            case _State.PLAIN:
                self._show(character)
            case _State.BARE:
                self._push_bare(character)
            case _State.OPENED:
                self._push_opened(character)
            case _State.CALL:
                self._push_call(character)
            case _State.BETWEEN:
                self._push_between(character)

    def _push_bare(self, character: str) -> None:
        if character in _WHITE_SPACE:
            self._spaces.append(character)
        elif character == "{":
            self._open_call(character)
        else:
            self._state = _State.TEXT
            self._push_text(character)

    def _push_text(self, character: str) -> None:
        opening, marker = self._family.opening, self._marker + character
        if marker == opening:
            self._raw.append(marker)
            self._marker = ""
            self._state = _State.OPENED
            return
        while marker and not opening.startswith(marker):
            self._show(marker[0])
            marker = marker[1:]
        if self._state is _State.PLAIN:
            self._show(marker)
            marker = ""
        self._marker = marker

    def _push_opened(self, character: str) -> None:
        if character == "{":
            self._open_call(character)
        elif character in _WHITE_SPACE:
            self._raw.append(character)
        elif character == "[" and not self._in_list:
            self._in_list = True
            self._raw.append(character)
        else:
            self._give_up()
            self._push(character)

    def _open_call(self, character: str) -> None:
        self._state = _State.CALL
        self._reader = CallReader(self._names)
        self._push_call(character)

    def _push_call(self, character: str) -> None:
        assert self._reader is not None
        progress = self._reader.push(character)
        if progress is Progress.FAILED:
            self._give_up()
            self._push(character)
            return
        if self._is_begun:
            if progress is Progress.DONE:
                self._end_call()
            return
        self._raw.append(character)
        if self._reader.has_begun:
            self._begin_call()

    def _begin_call(self) -> None:
        assert self._reader is not None and self._reader.name is not None
        self._tell_content()
        self._spaces.clear()
        self._raw.clear()
        self._is_begun = True
        self._is_wanted = self._max_calls is None or self.num_calls < self._max_calls
        if self._is_wanted:
            self._deltas.append(CallBegin(self.num_calls, self._reader.name))
            self.num_calls += 1

    def _end_call(self) -> None:
        self._tell_arguments()
        self._reader, self._is_begun, self._follows_call = None, False, True
        self._state = _State.BETWEEN

    def _push_between(self, character: str) -> None:
        """Behind a call: another one, what closes, or text again."""
        family, marker = self._family, self._marker + character
        if family.closing and family.closing.startswith(marker):
            self._marker = marker
            if marker == family.closing:
                self._close()
        elif self._marker:
            self._give_up()
            self._push(character)
        elif character in _WHITE_SPACE:
            self._raw.append(character)
        elif self._in_list and character == "]":
            self._in_list = False
            self._raw.clear()
        elif (character == "," and self._in_list) or (character == ";" and family.is_bare):
            self._raw.append(character)
            self._state = _State.OPENED
        elif character == "{" and family.is_bare and not self._in_list:
            self._open_call(character)
        else:
            self._give_up()
            self._push(character)

    def _close(self) -> None:
        self._raw.clear()
        self._marker, self._in_list, self._state = "", False, _State.TEXT

    def _give_up(self) -> None:
        """What was held back is no call, nor around one: it is text, as what follows is."""
        held = "".join(self._raw) + self._marker
        if self._is_begun:
            self._end_call()
        self._reader = None
        self._close()
        self._show(held)

    def _show(self, text: str) -> None:
        """White space at its end waits for what follows it: none is shown around calls."""
        shown = text.rstrip(_WHITE_SPACE)
        spaces = text[len(shown) :]
        if shown:
            if self._follows_call:
                shown = shown.lstrip(_WHITE_SPACE)
            else:
                self._content += self._spaces
            self._spaces.clear()
            self._follows_call = False
            self._content.append(shown)
            if self._are_alone and self.num_calls == 0 and not self._is_begun:
                self._state = _State.PLAIN
        if spaces:
            self._spaces.append(spaces)

    def _take(self) -> list[Delta]:
        if self._is_begun:
            self._tell_arguments()
        self._tell_content()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _tell_content(self) -> None:
        if self._content:
            self._deltas.append(Content("".join(self._content)))
            self._content.clear()

    def _tell_arguments(self) -> None:
        assert self._reader is not None
        fresh = self._reader.take_arguments()
        if fresh and self._is_wanted:
            self._deltas.append(CallArguments(self.num_calls - 1, fresh))
