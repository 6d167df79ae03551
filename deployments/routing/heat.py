"""How often a prefix is asked for, so that one that many ask for is not kept in one place.

To compute a prefix once more costs whoever asks first, and saves all who ask later from going where it is already. So
what a cached block is worth is shared among those that ask for it: a block that is asked for more than `hot_asks` times
for each replica that has it counts by as much less. A session's own prefix counts whole; a system prompt that each
prompt begins with counts next to nothing, and is soon everywhere.

Memory is bounded: counts are kept at the 1st, 2nd, 4th, ... block of a prompt and at its last, each for the blocks
since the one before, and the counts asked for longest ago go first. No clock of its own.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

# After so long an ask counts half.
_HALF_LIFE_S = 60.0
_MAX_COUNTS = 65_536


class Heat:
    """Counts of asks, by block."""

    def __init__(self, max_counts: int = _MAX_COUNTS) -> None:
        self._max_counts = max_counts
        self._counts: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # asks, and as of when

    def __len__(self) -> int:
        return len(self._counts)

    def look(self, chain: Sequence[bytes], now_s: float) -> list[tuple[int, float]]:
        """How often a prompt's blocks were asked for lately.

        Args:
            chain: hashes of its full blocks.
            now_s: the time.

        Returns:
            (end, asks) of consecutive parts of the prompt: how many blocks it has up to the end of the part, and how
            often that was asked for.
        """
        return [(end, self._asks(chain[end - 1], now_s)) for end in _ends(len(chain))]

    def ask(self, chain: Sequence[bytes], now_s: float) -> None:
        """A prompt asks for its blocks."""
        for end in _ends(len(chain)):
            asks = self._asks(chain[end - 1], now_s)
            self._counts.pop(chain[end - 1], None)  # to the end, as the one asked for last
            self._counts[chain[end - 1]] = (asks + 1.0, now_s)
        while len(self._counts) > self._max_counts:
            self._counts.popitem(last=False)

    def _asks(self, block: bytes, now_s: float) -> float:
        asks, as_of_s = self._counts.get(block, (0.0, now_s))
        keep: float = 0.5 ** ((now_s - as_of_s) / _HALF_LIFE_S)
        return asks * keep


def worth(depth: int, parts: Sequence[tuple[int, float, int]], hot_asks: float) -> float:
    """What so many leading blocks are worth, in blocks.

    Args:
        depth: blocks.
        parts: (end, asks, copies) of consecutive parts of the prompt; see `Heat.look`, and how many replicas have it.
        hot_asks: up to so many for each copy a block counts whole.
    """
    total, start = 0.0, 0
    for end, asks, copies in parts:
        length = min(end, depth) - start
        if length <= 0:
            break
        total += length * min(1.0, hot_asks * max(1, copies) / asks) if asks else length
        start = end
    return total


def _ends(num_blocks: int) -> Iterator[int]:
    end = 1
    while end < num_blocks:
        yield end
        end *= 2
    if num_blocks:
        yield num_blocks
