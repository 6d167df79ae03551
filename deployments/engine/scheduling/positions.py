"""Positions of a sequence whose rotary embedding depends on how long the sequence is.

Some embeddings rotate every token by the length of the sequence as well as by its position: LongRoPE by whether the
sequence has passed the length of its pretraining, dynamic NTK by the length itself. KV then belongs to a prefix *and* a
length. Both facts travel as one number: the length, in steps of `stride`, is added to the positions of the sequence,
and the rotary embedding (`model/rope.py`) takes the sum apart, token by token. The same number tells KV of one prefix
apart in the prefix cache.

The scheduler asks for it, and computes a sequence anew when it changes. Knows no tensors.
"""

from dataclasses import dataclass
from typing import Protocol


class PositionRule(Protocol):
    """What a model's rotary embedding needs to know of a sequence beside positions."""

    def offset(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """What is added to the positions of all tokens of a sequence; KV of another offset is of no use to it.

        Args:
            num_prompt_tokens: tokens that were there when the request came.
            num_tokens: all tokens so far, of which the next one is drawn.
        """
        ...


@dataclass(frozen=True, slots=True)
class FixedPositions:
    """Of nearly all models: a token is rotated by its position alone."""

    def offset(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return 0


FIXED = FixedPositions()


@dataclass(frozen=True, slots=True)
class SwitchedPositions:
    """LongRoPE: sequences of more than `border` tokens are rotated by other factors than shorter ones, from the start.

    So one that grows past the border is computed anew, once, as transformers' `generate` does for Phi-3.

    Attributes:
        border: tokens.
        stride: more than any position.
    """

    border: int
    stride: int

    def offset(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return self.stride if num_tokens > self.border else 0


@dataclass(frozen=True, slots=True)
class ScaledPositions:
    """Dynamic NTK: a prompt of more than `border` tokens is rotated by its length, each later token by its own.

    Attributes:
        border: tokens.
        stride: more than any position.
    """

    border: int
    stride: int

    def offset(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return num_prompt_tokens * self.stride if num_prompt_tokens > self.border else 0
