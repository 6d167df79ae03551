"""What changes in a prefix cache, in order, for those who choose an engine by what it has cached.

Owns the order of the changes and a bounded memory of them. Knows hashes of blocks, not who reads: each reader says how
far it has read, and is given what came since, or all that is there if that is no longer known. Written by the block
manager; not thread-safe, as that is not.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from secrets import randbits

# Of changes that are remembered: some seconds of an engine with many short prompts; a reader that is later than that is
# given all that is there.
_MAX_CHANGES = 16_384


@dataclass(frozen=True, slots=True)
class Position:
    """How far somebody has read.

    Attributes:
        epoch: which start of the engine it is of; another start has another cache.
        count: changes read.
    """

    epoch: int
    count: int


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """Consecutive changes of one engine's prefix cache, or all that is in it.

    Attributes:
        end: where they end.
        changes: hash of a block, and whether it is there from now on.
        is_snapshot: they are the whole cache, the oldest block first; else the last changes before `end`.
    """

    end: Position
    changes: tuple[tuple[bytes, bool], ...]
    is_snapshot: bool = False

    @property
    def start(self) -> int:
        """Changes before the first of them; of no meaning in a snapshot."""
        return self.end.count - len(self.changes)


class CacheLog:
    """The changes of one prefix cache.

    Args:
        max_changes: that are remembered.
        epoch: tells this start of the engine from others; drawn at random unless given.
    """

    def __init__(self, max_changes: int = _MAX_CHANGES, epoch: int | None = None) -> None:
        self._epoch = randbits(63) if epoch is None else epoch
        self._changes: deque[tuple[bytes, bool]] = deque(maxlen=max_changes)
        self._held: dict[bytes, None] = {}
        self._count = 0

    @property
    def position(self) -> Position:
        return Position(self._epoch, self._count)

    @property
    def held(self) -> Iterable[bytes]:
        """Hashes of the blocks that are there, the oldest first."""
        return self._held.keys()

    def published(self, block_hash: bytes) -> None:
        """A block can be found from now on."""
        assert block_hash not in self._held, f"block {block_hash.hex()} published twice"
        self._held[block_hash] = None
        self._note(block_hash, True)

    def evicted(self, block_hash: bytes) -> None:
        """A block is gone."""
        del self._held[block_hash]
        self._note(block_hash, False)

    def since(self, read: Position | None) -> CacheEvents:
        """What a reader lacks; all that is there, if it has read nothing or too little of this start."""
        num_new = self._count - read.count if read is not None and read.epoch == self._epoch else -1
        if not 0 <= num_new <= len(self._changes):
            return CacheEvents(self.position, tuple((block, True) for block in self._held), is_snapshot=True)
        newest_first = tuple(islice(reversed(self._changes), num_new))
        return CacheEvents(self.position, newest_first[::-1])

    def _note(self, block_hash: bytes, is_there: bool) -> None:
        self._changes.append((block_hash, is_there))
        self._count += 1
