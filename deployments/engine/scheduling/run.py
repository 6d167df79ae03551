"""What one step computes of one sequence."""

import msgspec

from deployments.engine.scheduling.sequence import Sequence
from deployments.messages import Draws


# A Struct, no dataclass, for one is made per sequence and step: in 0.1 us; a frozen dataclass takes 1.8 (Python 3.11).
class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):
    """A run: consecutive tokens of a sequence that one step computes.

    Attributes:
        sequence: whose.
        start: tokens of the sequence before them.
        num_tokens: at least 1, drafts included.
        num_draws: so many of its last tokens draw the one behind them: none in the middle of a prompt, one at its end.
        drafts: the last of its tokens, guessed and not yet part of the sequence. A draw counts if all drafts before it
            were guessed right.
        num_scored: so many of its first tokens tell how likely the known token behind each was.
        is_decode: it begins with the newest token of a sequence that decodes (`Sequence.is_decoding`), with any drafts.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_draws: int
    drafts: tuple[int, ...] = ()
    num_scored: int = 0
    is_decode: bool = False

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int, drafts: tuple[int, ...] = ()) -> "ScheduledSequence":
        """The next tokens of a sequence as it is now; drafts only behind its newest one."""
        is_newest = num_tokens == sequence.num_remaining_tokens
        assert is_newest or not drafts, f"{sequence.request_id}: drafts in the middle"
        num_draws = 1 + len(drafts) if is_newest else 0
        num_scored = num_tokens - num_draws if sequence.wants_scores else 0
        start, num_tokens = sequence.num_launched_tokens, num_tokens + len(drafts)
        return cls(sequence, start, num_tokens, num_draws, drafts, num_scored, sequence.is_decoding)

    @classmethod
    def decode(cls, sequence: Sequence, drafts: tuple[int, ...] = ()) -> "ScheduledSequence":
        """The newest token of a sequence that decodes, with drafts behind it."""
        num_tokens = 1 + len(drafts)
        return cls(sequence, sequence.num_launched_tokens, num_tokens, num_tokens, drafts, 0, True)

    @property
    def num_prompt_tokens(self) -> int:
        """Those of its tokens that are of the prompt."""
        return max(0, min(self.num_tokens, self.sequence.num_prompt_tokens - self.start))

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
