"""Stop strings in text that arrives in pieces. Knows nothing of tokens; `choices.py` uses one checker per choice."""

from collections.abc import Sequence


class StopChecker:
    """Finds the first stop string to be completed in text that arrives in pieces, however it is cut.

    Text that may turn out to be the start of a stop string is held back. Of two stops completed by the same character,
    the longer one counts. Each character costs one step of a Knuth-Morris-Pratt automaton per stop string, amortized.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take a piece; return the text to emit and whether a stop string is complete. After a hit, nothing follows."""
        buffered = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            hits = [matcher.length for matcher in self._matchers if matcher.advance(character)]
            if hits:
                return buffered[: end - max(hits)], True
        num_held = max((matcher.num_matched for matcher in self._matchers), default=0)
        split = len(buffered) - num_held
        self._held = buffered[split:]
        return buffered[:split], False

    def flush(self) -> str:
        """Return what was held back; no more text will come."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """How much of one stop string the text ends with. Source: Knuth, Morris, Pratt, SIAM J. Comput. 6(2), 1977."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._fallback = _borders(stop)
        self.length = len(stop)
        self.num_matched = 0

    def advance(self, character: str) -> bool:
        """Take one more character; True when it completes the stop string, which ends the matching."""
        while self.num_matched and self._stop[self.num_matched] != character:
            self.num_matched = self._fallback[self.num_matched - 1]
        if self._stop[self.num_matched] == character:
            self.num_matched += 1
        return self.num_matched == self.length


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
