"""What is cached where, as far as a router knows.

Owns, for each replica, the blocks that its engine said it has (`apply`), and those that it will have soon because this
router has just sent a prompt there (`expect`), so that a burst of one prefix meets what the first of it will leave.
Engines say what changed, in batches; a batch may be lost, late, or of another start of the engine, and a snapshot puts
all right. What is not right meanwhile costs a worse choice, never a wrong answer: engines look for themselves.

Memory is bounded: of each replica, as many blocks of either kind as its engine has, and no more than
`max_blocks_per_replica`. Knows no load. Not thread-safe, no clock of its own.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.routing.hashes import PromptHashes

# Of 132 bytes each (Python 3.11).
MAX_BLOCKS_PER_REPLICA = 262_144
Key = TypeVar("Key", bound=Hashable)

# A prompt that was sent is computed by then, and its blocks are told of; or it was lost.
EXPECTED_FOR_S = 60.0


class _Replica:
    """What one replica has.

    Attributes:
        bit: its place in the masks of the index.
        block_size: tokens per block of its engine.
        max_blocks: known of it at most, of either kind.
        known: blocks that its engine told of; the one told of first comes first.
        expected: blocks that it will have, and until when that is believed; what ends first comes first.
        position: how far its engine's changes were read; None: a snapshot is needed.
        read: where the last batch ended, whether or not it followed on the one before.
    """

    def __init__(self, bit: int, block_size: int, max_blocks: int) -> None:
        self.bit = bit
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.known: dict[bytes, None] = {}
        self.expected: dict[bytes, float] = {}
        self.position: Position | None = None
        self.read: Position | None = None


class PrefixIndex:
    """Which replica has which blocks.

    Args:
        max_blocks_per_replica: known of one replica at most, of either kind.
        expected_for_s: how long blocks are expected without being told of.
    """

    def __init__(
        self, max_blocks_per_replica: int = MAX_BLOCKS_PER_REPLICA, expected_for_s: float = EXPECTED_FOR_S
    ) -> None:
        self._max_blocks = max_blocks_per_replica
        self._expected_for_s = expected_for_s
        self._replicas: dict[str, _Replica] = {}
        self._free_bits: list[int] = []
        self._holders: dict[bytes, int] = {}  # a mask of replicas for each block that any of them has
        self._block_sizes: dict[str, int] = {}
        self._by_size: dict[int, int] = {}  # a mask of replicas for each size of blocks
        self._first_expiry_s = math.inf  # nothing that is expected is given up before

    @property
    def replicas(self) -> Iterable[str]:
        return self._replicas.keys()

    @property
    def num_blocks(self) -> int:
        """Blocks known or expected, each counted once for each replica and kind."""
        return sum(len(replica.known) + len(replica.expected) for replica in self._replicas.values())

    def join(self, name: str, block_size: int, num_blocks: int) -> None:
        """A replica that has nothing so far; one of that name is forgotten if its blocks were of another kind.

        Args:
            name: of the replica.
            block_size: tokens per block of its engine.
            num_blocks: that its engine has.
        """
        old, max_blocks = self._replicas.get(name), min(num_blocks, self._max_blocks)
        if old is not None and (old.block_size, old.max_blocks) == (block_size, max_blocks):
            return
        self.leave(name)
        bit = self._free_bits.pop() if self._free_bits else len(self._replicas)
        self._replicas[name] = _Replica(bit, block_size, max_blocks)
        self._block_sizes[name] = block_size
        self._by_size[block_size] = self._by_size.get(block_size, 0) | 1 << bit

    def leave(self, name: str) -> None:
        """A replica is gone, and what it had with it. Again: nothing happens."""
        if (replica := self._replicas.pop(name, None)) is not None:
            self._clear(replica)
            self._free_bits.append(replica.bit)
            del self._block_sizes[name]
            _take_bit(self._by_size, replica.block_size, replica.bit)

    def position(self, name: str) -> Position | None:
        """How far a replica's changes were read; None: all that it has is to be told."""
        return self._replicas[name].position

    def max_blocks(self, name: str) -> int:
        """Known of a replica at most, and as many expected."""
        return self._replicas[name].max_blocks

    @property
    def block_sizes(self) -> Mapping[str, int]:
        """Tokens per block, of each replica."""
        return self._block_sizes

    def apply(self, name: str, events: CacheEvents) -> None:
        """Take what an engine says of its cache; of a replica that is not known, or known better already: nothing."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        if replica.read is not None and replica.read.epoch != events.end.epoch:
            self._clear(replica)  # another start: the cache is another
        read, num_read = replica.read, replica.read.count if replica.read else 0
        if events.is_snapshot:
            # A late one is of no use, unless changes are missing: what came after it will be told again.
            if replica.position is None or events.end.count >= num_read:
                self._replace(replica, events)
            return
        if read is not None and events.end.count <= num_read:
            return  # twice, or late
        for block, is_there in events.changes[max(0, num_read - events.start) :]:
            if is_there:
                self._learn(replica, block)
            else:
                self._unlearn(replica, block)
        follows = events.start <= num_read and (read is None or replica.position is not None)
        replica.read = events.end
        # Where some are missing, what is known is the best guess still, but all has to be told again.
        replica.position = events.end if follows else None

    def expect(self, name: str, prompt: PromptHashes, now_s: float) -> None:
        """A prompt goes to a replica: its blocks will be there."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        self._expire(now_s)
        until_s = now_s + self._expected_for_s
        self._first_expiry_s = min(self._first_expiry_s, until_s)
        for block in prompt.of(replica.block_size):
            if block in replica.known:
                continue
            replica.expected.pop(block, None)  # to the end, as the one expected last
            replica.expected[block] = until_s
            self._holders[block] = self._holders.get(block, 0) | 1 << replica.bit
        while len(replica.expected) > replica.max_blocks:
            self._unexpect(replica, next(iter(replica.expected)))

    def disappoint(self, name: str, prompt: PromptHashes) -> None:
        """A prompt that was sent to a replica is not computed there: what was expected of it is not to come."""
        replica = self._replicas.get(name)
        if replica is not None:
            for block in prompt.of(replica.block_size):
                if block in replica.expected:
                    self._unexpect(replica, block)

    def match(self, prompt: PromptHashes, now_s: float) -> dict[str, int]:
        """Leading tokens of a prompt that each replica has; those that have none are left out."""
        self._expire(now_s)
        found: dict[int, int] = {}  # by bit
        for size, replicas in self._by_size.items():
            self._match(prompt.of(size)[: prompt.usable(size)], size, replicas, found)
        return {name: found[replica.bit] for name, replica in self._replicas.items() if replica.bit in found}

    def copies(self, block: bytes) -> int:
        """How many replicas have a block, or will have it soon."""
        return self._holders.get(block, 0).bit_count()

    def check_integrity(self) -> None:
        """Assert that what is known of replicas and of blocks is the same, and within bounds."""
        masks: dict[bytes, int] = {}
        for replica in self._replicas.values():
            assert len(replica.known) <= replica.max_blocks, "more is known of a replica than its engine has"
            assert len(replica.expected) <= replica.max_blocks, "more is expected of a replica than its engine has"
            assert not replica.known.keys() & replica.expected.keys(), "a block is both known and expected"
            for block in [*replica.known, *replica.expected]:
                masks[block] = masks.get(block, 0) | 1 << replica.bit
        by_size: dict[int, int] = {}
        for replica in self._replicas.values():
            by_size[replica.block_size] = by_size.get(replica.block_size, 0) | 1 << replica.bit
        assert by_size == self._by_size, "the masks of sizes disagree"
        assert self._block_sizes == {name: replica.block_size for name, replica in self._replicas.items()}
        assert masks == self._holders, "the blocks of replicas and the replicas of blocks disagree"
        bits = [replica.bit for replica in self._replicas.values()]
        assert sorted([*bits, *self._free_bits]) == list(range(len(bits) + len(self._free_bits))), "a bit was lost"

    def _match(self, chain: list[bytes], block_size: int, replicas: int, found: dict[int, int]) -> None:
        alive, holders = replicas, self._holders
        for depth, block in enumerate(chain):
            still = alive & holders.get(block, 0)
            if still != alive:
                if depth:
                    _note(alive & ~still, depth * block_size, found)
                alive = still
                if not alive:
                    return
        if chain:
            _note(alive, len(chain) * block_size, found)

    def _learn(self, replica: _Replica, block: bytes) -> None:
        replica.expected.pop(block, None)
        replica.known[block] = None
        self._holders[block] = self._holders.get(block, 0) | 1 << replica.bit
        if len(replica.known) > replica.max_blocks:  # its engine has evicted what was not told of
            self._unlearn(replica, next(iter(replica.known)))

    def _unlearn(self, replica: _Replica, block: bytes) -> None:
        if block in replica.known:
            del replica.known[block]
            self._remove(replica, block)

    def _unexpect(self, replica: _Replica, block: bytes) -> None:
        del replica.expected[block]
        self._remove(replica, block)

    def _remove(self, replica: _Replica, block: bytes) -> None:
        _take_bit(self._holders, block, replica.bit)

    def _replace(self, replica: _Replica, events: CacheEvents) -> None:
        """All that a replica has is told: nothing else is there. What was sent since is still expected."""
        told = dict.fromkeys(block for block, _ in events.changes)
        for block in [block for block in replica.known if block not in told]:
            self._unlearn(replica, block)
        for block in told:
            self._learn(replica, block)
        replica.position = replica.read = events.end

    def _clear(self, replica: _Replica) -> None:
        for block in [*replica.known, *replica.expected]:
            self._remove(replica, block)
        replica.known.clear()
        replica.expected.clear()
        replica.position = replica.read = None

    def _expire(self, now_s: float) -> None:
        if now_s < self._first_expiry_s:
            return
        self._first_expiry_s = math.inf
        for replica in self._replicas.values():
            while replica.expected:
                block, until_s = next(iter(replica.expected.items()))
                if until_s > now_s:
                    self._first_expiry_s = min(self._first_expiry_s, until_s)
                    break
                self._unexpect(replica, block)


def _take_bit(masks: dict[Key, int], key: Key, bit: int) -> None:
    """Take a replica from the mask of a key; a key without any is not kept."""
    if mask := masks[key] & ~(1 << bit):
        masks[key] = mask
    else:
        del masks[key]


def _note(mask: int, num_tokens: int, found: dict[int, int]) -> None:
    while mask:
        low = mask & -mask
        found[low.bit_length() - 1] = num_tokens
        mask ^= low
