"""Tells a model's thoughts from its answer, while its text comes. Knows neither tokens nor OpenAI's shapes."""

from dataclasses import dataclass
from enum import Enum, auto

from deployments.api.tools.parser import Content

_WHITE_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Thought:
    """Text that the model has written for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ThoughtRules:
    """How the thoughts of one call's answers are found.

    Attributes:
        opening: stands before them, at the very beginning of an answer.
        closing: stands behind them.
        is_open: the prompt ends with the opening, so that an answer begins with thoughts.
        is_over: the prompt ends with the closing, so that no thoughts are to come.
        opening_id: the token that the opening is; None: it is several.
        closing_id: likewise.
    """

    opening: str
    closing: str
    is_open: bool = False
    is_over: bool = False
    opening_id: int | None = None
    closing_id: int | None = None

    @property
    def marker_ids(self) -> frozenset[int]:
        """Tokens that must have a text for thoughts to be found."""
        return frozenset(token_id for token_id in (self.opening_id, self.closing_id) if token_id is not None)


class _State(Enum):
    START = auto()  # nothing has come but white space
    THOUGHT = auto()
    BEHIND = auto()  # nothing has come behind the thoughts but white space
    ANSWER = auto()


class ThoughtParser:
    """Of one answer, however its text is cut. White space around thoughts is left out.

    Args:
        rules: of the call.
    """

    def __init__(self, rules: ThoughtRules) -> None:
        self._rules = rules
        self._state = _State.THOUGHT if rules.is_open else _State.START
        self._held = ""
        self._has_thought = False

    def feed(self, text: str) -> list[Thought | Content]:
        """Take more text; return what is known by now."""
        self._held += text
        read: list[Thought | Content] = []
        if self._state is _State.START:
            self._read_start()
        if self._state is _State.THOUGHT:
            read += self._read_thought()
        if self._state is _State.BEHIND:
            self._held = self._held.lstrip(_WHITE_SPACE)
            if self._held:
                self._state = _State.ANSWER
        if self._state is _State.ANSWER:
            read += self._take_answer()
        return read

    def flush(self) -> list[Thought | Content]:
        """No more text will come: return what was held back."""
        if self._state is _State.THOUGHT:
            return self._think(self._held.rstrip(_WHITE_SPACE))
        return self._take_answer() if self._state is _State.START else []

    def _read_start(self) -> None:
        shown = self._held.lstrip(_WHITE_SPACE)
        if shown.startswith(self._rules.opening):
            self._held = shown.removeprefix(self._rules.opening)
            self._state = _State.THOUGHT
        elif not self._rules.opening.startswith(shown):
            self._state = _State.ANSWER

    def _read_thought(self) -> list[Thought | Content]:
        closing = self._rules.closing
        thought, marker, behind = self._held.partition(closing)
        if marker:
            self._held, self._state = behind, _State.BEHIND
            return self._think(thought.rstrip(_WHITE_SPACE))
        sizes = range(min(len(closing) - 1, len(self._held)), 0, -1)
        num_marker = next((size for size in sizes if self._held.endswith(closing[:size])), 0)
        thought = self._held[: len(self._held) - num_marker].rstrip(_WHITE_SPACE)
        self._held = self._held[len(thought) :]
        return self._think(thought)

    def _think(self, text: str) -> list[Thought | Content]:
        text = text if self._has_thought else text.lstrip(_WHITE_SPACE)
        self._has_thought = self._has_thought or bool(text)
        return [Thought(text)] if text else []

    def _take_answer(self) -> list[Thought | Content]:
        text, self._held = self._held, ""
        return [Content(text)] if text else []
