"""How many of an answer's tokens are thoughts, their markers included. Knows tokens where the parser knows text."""

from collections.abc import Sequence

from deployments.api.harmony import HarmonyCount, HarmonyRules
from deployments.api.reasoning.parser import ThoughtRules


def build_count(rules: ThoughtRules | HarmonyRules) -> "ThoughtCount | HarmonyCount":
    """For one answer."""
    return HarmonyCount(rules) if isinstance(rules, HarmonyRules) else ThoughtCount(rules)


class ThoughtCount:
    """Of one answer. Markers that are no tokens are not seen: then thoughts that a prompt has opened have no end.

    Args:
        rules: of the call.

    Attributes:
        num_tokens: by now.
    """

    def __init__(self, rules: ThoughtRules) -> None:
        self._rules = rules
        self._is_inside = rules.is_open
        self._is_over = False
        self.num_tokens = 0

    def add(self, token_ids: Sequence[int], text: str) -> None:
        """More tokens have come, and what is shown of them."""
        if self._is_over:
            return
        if not self._is_inside:
            self._is_inside = self._rules.opening_id in token_ids
            self._is_over = not self._is_inside and bool(text.strip())
        if self._is_inside:
            closing_id = self._rules.closing_id
            self._is_over = closing_id is not None and closing_id in token_ids
            self.num_tokens += list(token_ids).index(closing_id or 0) + 1 if self._is_over else len(token_ids)
