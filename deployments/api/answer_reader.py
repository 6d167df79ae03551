"""From the text of one answer to its parts: thoughts, then text and calls of tools. Shapes are made of them."""

from collections.abc import Sequence
from typing import Protocol

from deployments.api.harmony import HarmonyRules
from deployments.api.harmony_reader import HarmonyReader
from deployments.api.reasoning.parser import Thought, ThoughtParser, ThoughtRules
from deployments.api.tools.parser import Content, Delta
from deployments.api.tools.rules import ToolRules

Part = Thought | Delta


class Reader(Protocol):
    """Of one answer."""

    @property
    def num_calls(self) -> int:
        """Those that were told."""
        ...

    def read(self, text: str, *, is_last: bool) -> Sequence[Part]:
        """What new text adds, and what was held back if it is the last."""
        ...


def build_reader(tools: ToolRules | None, thoughts: ThoughtRules | HarmonyRules | None) -> Reader:
    """For one answer.

    Args:
        tools: how calls are found; None: none are looked for.
        thoughts: likewise.
    """
    if isinstance(thoughts, HarmonyRules):
        return HarmonyReader(thoughts, tools)
    return AnswerReader(tools, thoughts)


class AnswerReader:
    """Of an answer whose text is thoughts, then what is said with calls in it.

    Args:
        tools: how calls are found; None: none are looked for.
        thoughts: likewise.
    """

    def __init__(self, tools: ToolRules | None, thoughts: ThoughtRules | None) -> None:
        self._calls = None if tools is None else tools.build_parser()
        self._thoughts = None if thoughts is None else ThoughtParser(thoughts)

    @property
    def num_calls(self) -> int:
        return 0 if self._calls is None else self._calls.num_calls

    def read(self, text: str, *, is_last: bool) -> list[Part]:
        """What new text adds, and what was held back if it is the last."""
        parts: list[Part] = []
        for part in self._find_thoughts(text, is_last):
            if isinstance(part, Content) and self._calls is not None:
                parts += self._calls.feed(part.text)
            else:
                parts.append(part)
        if is_last and self._calls is not None:
            parts += self._calls.flush()
        return parts

    def _find_thoughts(self, text: str, is_last: bool) -> list[Thought | Content]:
        if self._thoughts is None:
            return [Content(text)] if text else []
        return self._thoughts.feed(text) + (self._thoughts.flush() if is_last else [])
