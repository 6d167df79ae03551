"""What one rendering of a chat template may use and has used, and how long a text will be before it is made.

Owns the limits. `template_sandbox.py` makes templates report here: it sets `METER` for the time of a rendering.
"""

import re
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

# Of all texts and lists that one rendering makes, whether they are kept or not: 256 MiB where they are ASCII.
_MAX_TOTAL_SIZE = 2**28
# 32 reports take about 10 us, a look at the thread's CPU time 1.3 us (one core of a shared CPU, 2026-11-27).
_TICKS_PER_LOOK = 32
MAX_INTEGER_BITS = 4096
# "%099999d" and "{:>99999}" make a long text of a short one.
WIDE_PERCENT_FORMAT = re.compile(r"%[^%a-zA-Z]*(?:\d{5}|\*)")
WIDE_BRACE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(?:\d{5}|\{)")


class LimitError(Exception):
    """A rendering was ended because it went over one of its limits; the message names the limit."""


class SizeLimitError(LimitError):
    """A text or list would have been longer than `Limits.max_size`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may use.

    Attributes:
        cpu_s: CPU seconds of its thread, so that a busy machine refuses nobody.
        max_size: characters of the result, and characters or elements of each text or list on the way to it.
    """

    cpu_s: float
    max_size: int


class Meter:
    """What one rendering has used."""

    __slots__ = ("_end_s", "_limits", "_num_ticks", "_total_size")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._end_s = time.thread_time() + limits.cpu_s
        self._num_ticks = 0
        self._total_size = 0

    def tick(self) -> None:
        self._num_ticks += 1
        if self._num_ticks % _TICKS_PER_LOOK == 0 and time.thread_time() > self._end_s:
            raise LimitError(f"it ran for more than {self._limits.cpu_s:g} s")

    def charge(self, size: int) -> None:
        """A text or list of that size is about to be made."""
        self._total_size += size
        if size > self._limits.max_size:
            raise SizeLimitError(f"it makes a text of more than {self._limits.max_size} characters")
        if self._total_size > _MAX_TOTAL_SIZE:
            raise LimitError(f"it makes more than {_MAX_TOTAL_SIZE} characters in all")

    def charge_text_of(self, value: object, separator: int = 1, indent: int = 0) -> None:
        """`value` is about to be written as text.

        Args:
            value: a text, or lists and mappings of texts; what else there is counts as one character.
            separator: characters between two elements.
            indent: characters before each element, times the depth that it stands in.
        """
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, _CONTAINERS):
            self.charge(self._text_size(value, separator, indent))

    def _text_size(self, value: object, separator: int, indent: int) -> int:
        # Without recursion, and keeping no more than where it stands: a list may hold itself many times over.
        size = 0
        stack: list[Iterator[object]] = [iter((value,))]
        while stack:
            for item in stack[-1]:
                self.tick()
                if size > self._limits.max_size:
                    return size
                if isinstance(item, _CONTAINERS):
                    num_elements = len(item) * (2 if isinstance(item, Mapping) else 1)
                    size += 2 + num_elements * (separator + indent * len(stack))
                    stack.append(chain.from_iterable(item.items()) if isinstance(item, Mapping) else iter(item))
                    break
                size += len(item) if isinstance(item, str) else 1
            else:
                stack.pop()
        return size


# What Python writes with all that it holds.
_CONTAINERS = (list, tuple, Mapping, KeysView, ValuesView, ItemsView)

METER: ContextVar[Meter] = ContextVar("meter")


# Those that only look: `startswith`, `isdigit`, `rfind`.
_LOOKING_METHODS = ("starts", "ends", "is", "find", "rfind", "index", "rindex", "count")


def size_of_method(name: str, text: str, args: tuple[Any, ...]) -> int:
    """How long the text is that a method of `text` will make, or an upper bound of it."""
    match name, args:
        case "center" | "ljust" | "rjust" | "zfill", (int(width), *_):
            return max(len(text), width)
        case "expandtabs", (int(width), *_):
            return len(text) + text.count("\t") * width
        case "replace", (str(old), str(new), *_):
            return len(text) + text.count(old) * len(new)
        case "join", (list(items),):
            return sum(len(item) for item in items if isinstance(item, str)) + len(text) * len(items)
        case "translate", (dict(table),):
            return len(text) * max((len(item) for item in table.values() if isinstance(item, str)), default=1)
        case "format" | "format_map", _:
            check_format(WIDE_BRACE_FORMAT, text)
    return 0 if name.startswith(_LOOKING_METHODS) else len(text)


def size_of_filter(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The same for a filter; its first argument is what it is applied to."""
    value, *others = args
    numbers = [number for number in [*others, *kwargs.values()] if isinstance(number, int)]
    texts = [text for text in [*others, *kwargs.values()] if isinstance(text, str)]
    width, longest = max(numbers, default=0), max(map(len, texts), default=0)
    match name, value:
        case "center", _:
            return width
        case "indent", str():
            return len(value) + (value.count("\n") + 1) * max(width, longest)
        case "replace", str():
            return len(value) + (value.count(texts[0]) if texts else 0) * longest
        case "wordwrap", str():
            return len(value) * (1 + longest)
        case "format", str():
            check_format(WIDE_PERCENT_FORMAT, value)
        case "join", list():
            return sum(len(item) for item in value if isinstance(item, str)) + longest * len(value)
        case "slice", _:
            return width
        case "batch", _ if len(others) + len(kwargs) > 1:  # what fills the last row
            return width
    return 0


def check_format(pattern: re.Pattern[str], text: str) -> None:
    if pattern.search(text):
        raise LimitError("it pads a text to a width of more than 9999")
