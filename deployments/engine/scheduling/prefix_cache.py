"""Which blocks of the pool hold which part of which text: the names of full blocks, by the group of layers.

Owns the names, and what is told of those that come and go. Knows nothing of who holds a block. Used by the block
manager; what says so is safe from any thread, and may be out of date at once.
"""

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Chain

from deployments.engine.scheduling.cache_log import CacheLog
from deployments.engine.scheduling.retention import Retention


class PrefixCache:
    """See the module.

    Args:
        retention: what of a sequence is kept.

    Attributes:
        named: blocks that can be found, each with its group and the hash of what it holds.
        log: of the blocks of the first group: whoever chooses an engine goes by these.
        num_brought_hits: blocks that came from outside and were found by a sequence, each once.
    """

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._block_of: tuple[dict[bytes, int], ...] = tuple({} for _ in retention.windows)
        self._full, self._windowed = self._block_of[: retention.num_full], self._block_of[retention.num_full :]
        self.named: dict[int, tuple[int, bytes]] = {}
        self._origin_of: dict[int, str | None] = {}  # for which request it was computed; None: long before
        self._brought: set[int] = set()  # of the first group, from outside, and found by nobody yet
        self.num_brought_hits = 0
        self.log = CacheLog()

    def enter(self, group: int, block: int, block_hash: bytes, origin: str | None) -> bool:
        """A block holds this from now on; False: another one does, which stays, or it has a name already."""
        if block_hash in self._block_of[group] or block in self.named:
            return False
        self._block_of[group][block_hash] = block
        self.named[block] = group, block_hash
        self._origin_of[block] = origin
        if group == 0:
            self.log.published(block_hash)
        return True

    def bring(self, blocks: Iterable[int], block_hash: bytes, origin: str | None) -> None:
        """Blocks of all groups hold this, and it came from outside."""
        for group, block in enumerate(blocks):
            if self.enter(group, block, block_hash, origin) and group == 0:
                self._brought.add(block)

    def forget(self, block: int) -> None:
        """It will hold something else."""
        group, block_hash = self.named.pop(block)
        del self._block_of[group][block_hash], self._origin_of[block]
        self._brought.discard(block)
        if group == 0:
            self.log.evicted(block_hash)

    def note_found(self, blocks: list[int]) -> None:
        """A sequence shares these of the first group."""
        if self._brought:
            self.num_brought_hits += len(self._brought.intersection(blocks))
            self._brought.difference_update(blocks)

    def origin_of(self, block: int) -> str | None:
        """For which request a block was computed that can be found."""
        return self._origin_of[block]

    def num_cached(self, hashes: Chain[bytes]) -> int:
        """Leading blocks that every group has. From any thread."""
        return _num_leading(hashes, self._block_of)

    def usable(self, hashes: Chain[bytes]) -> tuple[int, int]:
        """Of a sequence with these blocks the first one that is read within windows behind the longest usable prefix.

        And the end of that. From any thread.
        """
        if not self._windowed:
            return 0, _num_leading(hashes, self._full)
        end = self._retention.longest_prefix((_has(self._full, name), _has(self._windowed, name)) for name in hashes)
        return self._retention.num_passed(end * self._retention.block_size), end

    def blocks_of(self, hashes: Chain[bytes], num_passed: int = 0) -> list[list[int]]:
        """By the group, blocks with these names; in those with a window without so many leading ones."""
        found = [[blocks[name] for name in hashes] for blocks in self._full]
        return found + [[blocks[name] for name in hashes[num_passed:]] for blocks in self._windowed]

    def check_integrity(self, blank: Collection[int], cached: Collection[int]) -> None:
        """Assert that all that is kept of names agrees.

        Args:
            blank: blocks without a name.
            cached: with one, and held by nobody.
        """
        assert not any(block in self.named for block in blank), "a blank block has a hash"
        assert all(block in self.named for block in cached), "a cached block has no hash"
        found = {b: (group, h) for group, blocks in enumerate(self._block_of) for h, b in blocks.items()}
        assert found == self.named, "hash tables disagree"
        assert self._origin_of.keys() == self.named.keys(), "a block is of no request, or of one without a hash"
        assert self._brought <= self.named.keys(), "a block from outside cannot be found"
        assert set(self.log.held) == self._block_of[0].keys(), "the log tells of other blocks than there are"


def _has(groups: Iterable[dict[bytes, int]], block_hash: bytes) -> bool:
    return all(block_hash in blocks for blocks in groups)


def _num_leading(hashes: Chain[bytes], groups: Iterable[dict[bytes, int]]) -> int:
    """Leading blocks that all of these groups have."""
    return min(next((i for i, name in enumerate(hashes) if name not in blocks), len(hashes)) for blocks in groups)
