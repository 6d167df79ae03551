"""How much of a sequence's KV is kept: all of it, or what the newest tokens see where every layer has a window.

Owns the arithmetic of windows in blocks. Knows neither sequences nor tensors. Asked by the block manager, by hand-offs,
and where requests are checked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Self

from deployments.engine.config import EngineLimits


@dataclass(frozen=True, slots=True)
class Retention:
    """See the module.

    Attributes:
        block_size: tokens per block.
        window: tokens that a token sees in any layer, itself included; None: all before it.
        max_step_tokens: that one step computes at most.
    """

    block_size: int
    window: int | None = None
    max_step_tokens: int = 0

    @classmethod
    def of(cls, limits: EngineLimits) -> Self:
        """An engine's with these limits."""
        return cls(limits.block_size, limits.kv_window, limits.max_num_batched_tokens)

    def num_passed(self, position: int) -> int:
        """Leading blocks that no token from this position on sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.block_size

    def reach(self, num_tokens: int, num_found: int) -> int:
        """For how many of its tokens a sequence is given blocks when it begins.

        For as many as it ever holds at once; those that it passes make room for the rest.

        Args:
            num_tokens: of the sequence.
            num_found: leading ones that need not be computed.
        """
        if self.window is None:
            return num_tokens
        return min(num_tokens, max(num_found, self.window) + self.max_step_tokens)

    def least_blocks(self, num_tokens: int) -> int:
        """Blocks without which a sequence of so many tokens cannot be computed, be it a token at a time."""
        num_blocks = -(-num_tokens // self.block_size)
        # Of a window's tokens the first may be the last of its block.
        return num_blocks if self.window is None else min(num_blocks, -(-self.window // self.block_size) + 1)

    def longest(self, num_blocks: int, max_tokens: int) -> int:
        """Tokens of the longest sequence that a pool of so many blocks takes, up to a bound."""
        return max_tokens if self.least_blocks(max_tokens) <= num_blocks else num_blocks * self.block_size

    def longest_prefix(self, cached: Iterable[bool]) -> int:
        """Leading blocks behind which a sequence can go on, if these of its blocks are cached."""
        if self.window is None:
            return sum(1 for _ in takewhile(bool, cached))
        longest = run = 0
        for number, is_cached in enumerate(cached, 1):
            run = run + 1 if is_cached else 0
            if is_cached and run >= number - self.num_passed(number * self.block_size):
                longest = number
        return longest
