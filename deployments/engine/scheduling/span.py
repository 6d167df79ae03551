"""Where a step works in a sequence, as numbers: all that the sequence itself is told of it."""

import msgspec


class Span(msgspec.Struct, frozen=True, gc=False):
    """Consecutive tokens of one sequence that a step computes.

    Attributes:
        start: tokens of the sequence before them.
        num_tokens: at least 1, drafts included.
        num_draws: so many of its last tokens draw the one behind them: none in the middle of a prompt, one at its end.
        drafts: the last of its tokens, guessed and not yet part of the sequence. A draw counts if all drafts before it
            were guessed right.
    """

    start: int
    num_tokens: int
    num_draws: int
    drafts: tuple[int, ...]

    @property
    def first_draw(self) -> int:
        """Place in the sequence of the first token that it draws."""
        return self.start + self.num_tokens - self.num_draws + 1

    def num_counted(self, tokens: list[int], first: int) -> int:
        """How many of its draws count: up to the first that is not as drafted.

        Args:
            tokens: drawn by a step.
            first: place of its own first one among them.
        """
        for number, draft in enumerate(self.drafts):
            if tokens[first + number] != draft:
                return number + 1
        return len(self.drafts) + 1
