"""The prefix cache of a modelled engine: which blocks are there. Knows no time."""

from collections import OrderedDict

from deployments.engine.scheduling.cache_log import CacheLog
from deployments.simulator.requests import BLOCK_SIZE


class ModelledCache:
    """Blocks of prompts, beside those that running sequences hold; what was used longest ago goes first.

    Args:
        num_blocks: of the engine's pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self.log = CacheLog()

    def find(self, chain: tuple[bytes, ...], prompt_tokens: int) -> int:
        """Leading tokens of a prompt that are there; the last token is always computed."""
        found = 0
        for block in chain[: (prompt_tokens - 1) // BLOCK_SIZE]:
            if block not in self._blocks:
                break
            self._blocks.move_to_end(block)
            found += BLOCK_SIZE
        return found

    def keep(self, chain: tuple[bytes, ...], num_held: float) -> None:
        """A prompt was computed; so many blocks are held by sequences."""
        for block in reversed(chain):
            if block not in self._blocks:
                self._blocks[block] = None
                self.log.published(block)
            self._blocks.move_to_end(block)
        self.make_room(num_held)

    def make_room(self, num_held: float) -> None:
        """Let go of what has no place beside the blocks that are held."""
        while self._blocks and len(self._blocks) > self._num_blocks - num_held:
            self.log.evicted(self._blocks.popitem(last=False)[0])
