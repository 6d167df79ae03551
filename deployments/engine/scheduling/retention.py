"""How much of a sequence's KV is kept: all of it, or in groups of layers with a window what the newest tokens see.

Owns the arithmetic of windows in blocks. Knows neither sequences nor tensors. Asked by the block manager, by hand-offs,
and where requests are checked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from deployments.engine.config import EngineLimits


@dataclass(frozen=True, slots=True)
class Retention:
    """See the module.

    Attributes:
        block_size: tokens per block.
        windows: of each group of layers, tokens that a token sees, itself included; None: all before it. Groups that
            keep all come first, all others have one window.
        max_step_tokens: that one step computes at most.
    """

    block_size: int
    windows: tuple[int | None, ...] = (None,)
    max_step_tokens: int = 0

    def __post_init__(self) -> None:
        others = self.windows[self.num_full :]
        assert self.windows and None not in others and len({*others}) <= 1, f"windows {self.windows} are out of order"

    @classmethod
    def of(cls, limits: EngineLimits) -> Self:
        """An engine's with these limits."""
        return cls(limits.block_size, limits.kv_windows, limits.max_num_batched_tokens)

    @property
    def num_full(self) -> int:
        """Groups that keep all."""
        return self.windows.count(None)

    @property
    def num_windowed(self) -> int:
        return len(self.windows) - self.num_full

    @property
    def window(self) -> int | None:
        """Of the groups that have one; None: none has."""
        return self.windows[-1]

    def num_passed(self, position: int) -> int:
        """Leading blocks that no token from this position on sees within a window."""
        window = self.windows[-1]
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def num_unread(self, position: int) -> int:
        """Leading blocks that no token from this position on sees in any layer."""
        return 0 if self.num_full else self.num_passed(position)

    def reach(self, num_tokens: int, num_found: int) -> int:
        """For how many of its tokens a sequence is given blocks of groups with a window when it begins.

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
        return self.num_full * num_blocks + self.num_windowed * min(num_blocks, self._most_seen)

    def longest(self, num_blocks: int, max_tokens: int) -> int:
        """Tokens of the longest sequence that a pool of so many blocks takes, up to a bound."""
        if self.least_blocks(max_tokens) <= num_blocks:
            return max_tokens
        of_each = num_blocks // len(self.windows)
        if self.num_full and of_each > self._most_seen:
            of_each = (num_blocks - self.num_windowed * self._most_seen) // self.num_full
        return of_each * self.block_size

    def longest_prefix(self, cached: Iterable[tuple[bool, bool]]) -> int:
        """Leading blocks behind which a sequence can go on.

        Args:
            cached: of each of its blocks, whether all groups that keep all have it, and whether those with a window do.
        """
        longest = run = 0
        for number, (in_full, in_windowed) in enumerate(cached, 1):
            if not in_full:
                break
            run = run + 1 if in_windowed else 0
            if in_windowed and run >= number - self.num_passed(number * self.block_size):
                longest = number
        return longest

    @property
    def _most_seen(self) -> int:
        """Blocks of a window: of its tokens the first may be the last of its block."""
        return 0 if self.window is None else -(-self.window // self.block_size) + 1
