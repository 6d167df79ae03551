"""Reads one call of a tool, a JSON object, as its characters come. Knows no markers; `parser.py` has those."""

import json
from collections.abc import Collection
from enum import Enum, auto

_WHITE_SPACE = " \t\n\r"
# `parameters` is Llama's word for them.
_ARGUMENTS = ("arguments", "parameters")


class Progress(Enum):
    """What a character did to a call."""

    GOES_ON = auto()
    DONE = auto()  # it was the last one
    FAILED = auto()  # it is no part of a call


class _Place(Enum):
    """Where in the object the next character stands."""

    START = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()


class CallReader:
    """One object with a name and arguments, in any order. It is a call once both are known.

    Arguments are told as they are written, so that they can be sent before they are complete. What is written in them
    is not looked at further than needed to find their end.

    Args:
        names: of the tools; a call of another is none.

    Attributes:
        name: of the tool, once `has_begun`.
        has_begun: name and arguments are known: what follows is part of a call, whatever it is.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._place = _Place.START
        self._is_first = True
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._is_text = self._is_escaped = False
        self._early_arguments: str | None = None
        self._fresh: list[str] = []
        self._has_arguments = False
        self.name: str | None = None

    @property
    def has_begun(self) -> bool:
        return self.name is not None and self._has_arguments

    def take_arguments(self) -> str:
        """What has come of the arguments since it was last asked."""
        fresh = "".join(self._fresh)
        self._fresh.clear()
        return fresh

    def push(self, character: str) -> Progress:
        """Take the next character; none may follow one that was the last or failed."""
        if self._place is _Place.VALUE and self._value:
            return self._push_value(character)
        if character in _WHITE_SPACE and not (self._place is _Place.KEY and self._value):
            return Progress.GOES_ON
        match self._place:
            case _Place.START:
                return self._go(_Place.KEY, character == "{")
            case _Place.KEY:
                return self._push_key(character)
            case _Place.COLON:
                return self._go(_Place.VALUE, character == ":")
            case _Place.VALUE:
                return self._open_value(character)
            case _Place.COMMA if character == "}":
                return Progress.DONE if self.has_begun else Progress.FAILED
        return self._go(_Place.KEY, character == ",")

    def _go(self, place: _Place, is_right: bool) -> Progress:
        self._place = place
        return Progress.GOES_ON if is_right else Progress.FAILED

    def _push_key(self, character: str) -> Progress:
        if not self._value and character != '"':
            return Progress.FAILED
        self._value.append(character)
        if not self._ends_text(character):
            return Progress.GOES_ON
        key = _decode("".join(self._value))
        self._value.clear()
        if not isinstance(key, str):
            return Progress.FAILED
        self._key = key
        return self._go(_Place.COLON, True)

    def _open_value(self, character: str) -> Progress:
        if character in ",:}]":
            return Progress.FAILED
        if self._key == "name" and (self.name is not None or character != '"'):
            return Progress.FAILED
        if self._key in _ARGUMENTS:
            if self._has_arguments or self._early_arguments is not None or character not in '{"':
                return Progress.FAILED
            self._has_arguments = self.name is not None and character == "{"
        return self._push_value(character)

    def _push_value(self, character: str) -> Progress:
        streams = self._key in _ARGUMENTS and self._has_arguments
        opened = self._value[:1]
        if opened and opened[0] not in '{["' and character in ",}" + _WHITE_SPACE:  # behind a number or a word
            self._value.clear()
            self._place = _Place.COMMA
            return self.push(character)
        if streams:
            self._fresh.append(character)
        if not streams or not opened:
            self._value.append(character)
        return self._close_value() if self._ends_value(character) else Progress.GOES_ON

    def _ends_value(self, character: str) -> bool:
        if self._is_text or character == '"':
            return self._ends_text(character) and self._depth == 0
        if character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def _ends_text(self, character: str) -> bool:
        """Follow a string, from its first quotation mark to its last."""
        if not self._is_text:
            self._is_text = character == '"'
        elif self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_text = False
            return True
        return False

    def _close_value(self) -> Progress:
        value = "".join(self._value)
        self._value.clear()
        self._place = _Place.COMMA
        if self._key == "name":
            name = _decode(value)
            if name not in self._names:
                return Progress.FAILED
            self.name = str(name)
        elif self._key in _ARGUMENTS and not self._has_arguments:
            if value[0] == '"':  # some models write the object as a string
                told = _decode(value)
                if not isinstance(told, str) or not isinstance(_decode(told), dict):
                    return Progress.FAILED
                value = told
            self._early_arguments = value
        if self.name is not None and self._early_arguments is not None:
            self._fresh.append(self._early_arguments)
            self._early_arguments = None
            self._has_arguments = True
        return Progress.GOES_ON


def _decode(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
