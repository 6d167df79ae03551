"""Which blocks of the pool hold the KV of one sequence: a table for each group of layers.

Groups that keep all KV come first. The others hold no blocks behind their window, and all of them hold the same ones.
A table keeps its length: in place of blocks that were passed it names the first one that is held, for what stands there
is read and not seen, so it must be KV of this sequence. Knows neither tokens nor who owns the blocks.
"""

from array import array
from collections.abc import Iterable, Sequence

from deployments.engine.scheduling.ids import block_array


class BlockTables:
    """See the module.

    Args:
        each: tables, as `block_array` makes them; none: there is an empty one, and others come with blocks.

    Attributes:
        each: physical block of each logical one, by the group; every table stays the same array.
        num_full: groups that keep all.
        num_passed: leading blocks that groups with a window hold no longer.
    """

    __slots__ = ("each", "num_full", "num_passed")

    def __init__(self, *each: "array[int]") -> None:
        self.each = list(each) or [block_array()]
        self.num_full = 0
        self.num_passed = 0

    @property
    def num_blocks(self) -> int:
        """For whose tokens there is room in every group; those that keep all may have more."""
        return len(self.each[-1])

    @property
    def num_unread(self) -> int:
        """Leading blocks that no group holds."""
        return 0 if self.num_full else self.num_passed

    def take(self, blocks: Sequence[list[int]], num_full: int, num_passed: int) -> None:
        """Begin: hold these blocks by the group, those of groups with a window behind so many passed ones."""
        assert not self.each[0], "blocks are held already"
        self.num_full, self.num_passed = num_full, num_passed
        while len(self.each) < len(blocks):
            self.each.append(block_array())
        for group, (table, held) in enumerate(zip(self.each, blocks, strict=True)):
            if group >= num_full:
                table.extend(held[:1] * num_passed)
            table.extend(held)

    def add(self, blocks: Iterable[list[int]]) -> None:
        """Hold more of them, by the group."""
        for table, more in zip(self.each, blocks, strict=True):
            table.extend(more)

    def missing(self, num_blocks: int) -> list[int]:
        """How many each group lacks of so many."""
        return [max(0, num_blocks - len(table)) for table in self.each]

    def pass_blocks(self, num_blocks: int) -> "array[int]":
        """Nobody reads so many leading blocks within windows any more: gives those back that were held but the last."""
        num_blocks, passed = min(num_blocks, self.num_blocks - 1), block_array()
        if num_blocks > self.num_passed:
            for table in self.each[self.num_full :]:
                passed += table[self.num_passed : num_blocks]
                table[:num_blocks] = table[num_blocks : num_blocks + 1] * num_blocks
            self.num_passed = num_blocks
        return passed

    def drop_surplus(self, num_blocks: int) -> "array[int]":
        """Keep so many blocks of each group; gives the others back."""
        surplus = block_array()
        for table in self.each:
            surplus += table[num_blocks:]
            del table[num_blocks:]
        return surplus

    def drop(self) -> "array[int]":
        """Hold nothing any more; gives everything back."""
        held = block_array()
        for table, blocks in zip(self.each, self.held(), strict=True):
            held += blocks
            del table[:]
        self.num_passed = 0
        return held

    def held(self) -> "list[array[int]]":
        """What is held, by the group."""
        first = self.num_full
        return [table[self.num_passed if group >= first else 0 :] for group, table in enumerate(self.each)]

    def spans(self, blocks: range, num_passed: int) -> list[range]:
        """Of consecutive blocks those that each group has, once so many are passed."""
        within = range(max(blocks.start, min(num_passed, blocks.stop)), blocks.stop)
        return [within if group >= self.num_full else blocks for group in range(len(self.each))]
