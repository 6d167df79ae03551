"""Reads answers in the format of gpt-oss while their text comes: thoughts, what is shown, calls of functions.

A message of the channel `analysis` is a thought, one to a function that was offered is a call of it, and all else is
shown. Knows no OpenAI shapes and no requests; `answer_reader.py` says which answers it reads.
"""

import re
from enum import Enum, auto

from deployments.api.harmony import (
    ANALYSIS,
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MARKERS,
    MESSAGE,
    RETURN,
    START,
    HarmonyRules,
)
from deployments.api.reasoning.parser import Thought
from deployments.api.tools.parser import CallArguments, CallBegin, Content
from deployments.api.tools.rules import ToolRules

# Behind a body; what begins another header is part of that.
_BORDERS = re.compile("|".join(map(re.escape, (END, CALL, RETURN, START, CHANNEL))))
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)|\bto=\S")
_NAMED_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
# The first header begins behind the role, which the prompt has written.
_HEADER_STARTS = (CHANNEL, START, " to=", CONSTRAIN, MESSAGE)


class _Kind(Enum):
    """What a message is."""

    THOUGHT = auto()
    CONTENT = auto()
    CALL = auto()
    UNWANTED = auto()  # a call too many


class HarmonyReader:
    """Of one answer, however its text is cut.

    Args:
        rules: of the call.
        tools: that may be called; None: none.

    Attributes:
        num_calls: those that were told.
    """

    def __init__(self, rules: HarmonyRules, tools: ToolRules | None) -> None:
        self._tools = tools
        self._held = ""
        self._is_header = not rules.is_body
        self._is_first = True
        self._kind = _Kind.CONTENT
        self._told: set[_Kind] = set()  # of all messages before
        self._has_body = False
        self._parts: list[Thought | Content | CallBegin | CallArguments] = []
        self.num_calls = 0

    def read(self, text: str, *, is_last: bool) -> list[Thought | Content | CallBegin | CallArguments]:
        """What new text adds, and what was held back if it is the last."""
        self._held += text
        while self._read_header(is_last) if self._is_header else self._read_body(is_last):
            pass
        parts, self._parts = self._parts, []
        return parts

    def _read_header(self, is_last: bool) -> bool:
        """Whether there is more to be read behind it."""
        if self._is_first and self._is_no_header(is_last):
            self._is_header = self._is_first = False
            return True
        header, marker, behind = self._held.partition(MESSAGE)
        if marker:
            self._held = behind
            self._open(header)
        return bool(marker)  # half a header at the end says nothing

    def _is_no_header(self, is_last: bool) -> bool:
        """An answer without any: text from its beginning."""
        held = self._held
        if not held or any(held.startswith(start) for start in _HEADER_STARTS):
            return False
        return is_last or not any(start.startswith(held) for start in _HEADER_STARTS)

    def _open(self, header: str) -> None:
        recipient, channel = _RECIPIENT.search(header), _NAMED_CHANNEL.search(header)
        self._is_header = self._is_first = self._has_body = False
        self._kind = _Kind.CONTENT
        name = None if recipient is None else recipient[1]
        if self._tools is not None and name in self._tools.names:
            max_calls = self._tools.max_calls
            self._kind = _Kind.CALL if max_calls is None or self.num_calls < max_calls else _Kind.UNWANTED
        elif recipient is None and channel is not None and channel[1] == ANALYSIS:
            self._kind = _Kind.THOUGHT
        if self._kind is _Kind.CALL and name is not None:
            self._parts.append(CallBegin(self.num_calls, name))
            self.num_calls += 1

    def _read_body(self, is_last: bool) -> bool:
        """Whether there is more to be read behind it."""
        border = _BORDERS.search(self._held)
        if border is None:
            num_held = 0 if is_last else _num_of_marker(self._held)
            self._tell(self._held[: len(self._held) - num_held])
            self._held = self._held[len(self._held) - num_held :]
            if is_last:
                self._close()
            return False
        self._tell(self._held[: border.start()])
        self._close()
        self._held = self._held[border.start() if border[0] in (START, CHANNEL) else border.end() :]
        self._is_header = True
        return True

    def _tell(self, text: str) -> None:
        if not text:
            return
        # Messages of one kind are told as one text.
        text = "\n" + text if self._kind in self._told and not self._has_body else text
        self._has_body = True
        match self._kind:
            case _Kind.THOUGHT:
                self._parts.append(Thought(text))
            case _Kind.CONTENT:
                self._parts.append(Content(text))
            case _Kind.CALL:
                self._parts.append(CallArguments(self.num_calls - 1, text))

    def _close(self) -> None:
        """The message is whole, or the last one."""
        if self._kind is _Kind.CALL and not self._has_body:
            self._tell("{}")
        if self._has_body and self._kind in (_Kind.THOUGHT, _Kind.CONTENT):
            self._told.add(self._kind)


def _num_of_marker(text: str) -> int:
    """Characters at the end of a text that may begin a marker."""
    place = text.rfind("<")
    rest = text[place:]
    return len(rest) if place >= 0 and any(marker.startswith(rest) for marker in MARKERS) else 0
