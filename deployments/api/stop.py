"""Stop strings in text that arrives in pieces. Knows nothing of tokens; `choices.py` uses one checker per choice."""

from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice


class StopChecker:
    """Finds the first stop string to be completed in text that arrives in pieces, however it is cut.

    Text that may turn out to be the start of a stop string is held back. Of two stops completed by the same character,
    the longer one counts. Each character costs one step of a Knuth-Morris-Pratt automaton per stop string, amortized.

    Some text is there and not shown: special tokens. A stop string that names one looks for it in all of the text;
    the others look at what is shown.

    Args:
        stops: non-empty strings.
        specials: special tokens, as they are written.
        include_stop: the stop string is part of the text.
    """

    def __init__(self, stops: Sequence[str], specials: Collection[str] = (), *, include_stop: bool = False) -> None:
        self._matchers = [_Matcher(stop, any(special in stop for special in specials)) for stop in stops]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece; return the text to emit and whether a stop string is complete. After a hit, nothing follows."""
        buffered = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            hits = [matcher.num_shown for matcher in self._matchers if matcher.advance(character)]
            if hits:
                return self._cut(buffered[:end], max(hits)), True
        return self._emit(buffered), False

    def push_hidden(self, text: str) -> tuple[str, bool]:
        """Take a special token, which is not shown; see `push`."""
        matchers = [matcher for matcher in self._matchers if matcher.sees_hidden]
        for character in text:
            hits = [matcher.num_shown for matcher in matchers if matcher.advance(character, is_shown=False)]
            if hits:
                return self._cut(self._held, max(hits)), True
        return self._emit(self._held), False

    def flush(self) -> str:
        """Return what was held back; no more text will come."""
        held, self._held = self._held, ""
        return held

    def _cut(self, text: str, num_stop: int) -> str:
        return text if self._include_stop else text[: len(text) - num_stop]

    def _emit(self, buffered: str) -> str:
        num_held = max((matcher.num_shown for matcher in self._matchers), default=0)
        split = len(buffered) - num_held
        self._held = buffered[split:]
        return buffered[:split]


class _Matcher:
    """How much of one stop string the text ends with. Source: Knuth, Morris, Pratt, SIAM J. Comput. 6(2), 1977."""

    def __init__(self, stop: str, sees_hidden: bool) -> None:
        self._stop = stop
        self._length = len(stop)
        self._fallback = _borders(stop)
        self._num_matched = 0
        # Whether each of the last characters is shown; all are, where hidden ones are not looked at.
        self._shown: deque[bool] | None = deque(maxlen=self._length) if sees_hidden else None

    @property
    def sees_hidden(self) -> bool:
        return self._shown is not None

    @property
    def num_shown(self) -> int:
        """Characters at the end of the shown text that are matched."""
        if self._shown is None:
            return self._num_matched
        return sum(islice(reversed(self._shown), self._num_matched))

    def advance(self, character: str, *, is_shown: bool = True) -> bool:
        """Take one more character; True when it completes the stop string, which ends the matching."""
        stop, num_matched = self._stop, self._num_matched
        while num_matched and stop[num_matched] != character:
            num_matched = self._fallback[num_matched - 1]
        num_matched += stop[num_matched] == character
        self._num_matched = num_matched
        if self._shown is not None:
            self._shown.append(is_shown)
        return num_matched == self._length


def _borders(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for end in range(1, len(text)):
        while length and text[end] != text[length]:
            length = borders[length - 1]
        length += text[end] == text[length]
        borders[end] = length
    return borders
