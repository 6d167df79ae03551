"""Where a step works in a sequence, as numbers: all that the sequence itself is told of it."""

import msgspec

from deployments.messages import Draws


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

    def accept(self, draws: Draws) -> Draws:
        """Of all its draws those that count: up to the first that is not as drafted."""
        for number, (draft, token) in enumerate(zip(self.drafts, draws, strict=False), 1):
            if token.token_id != draft:
                return draws[:number]
        return draws
