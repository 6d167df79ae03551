"""Blocks of an engine's prefix cache, lent to those who copy KV out of it or into it beside the steps.

Owns the loans: blocks that no step writes to and nobody gives away until they are given back. Says which stretches of
sequences have become findable, for whoever keeps them elsewhere. Knows nothing of where the copies go. What begins or
ends a loan is for the engine's thread; the rest says so.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch

from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.copies import KVCopies
from deployments.engine.kv.host_copies import HostCopies
from deployments.engine.kv.pinned import PinnedMemory
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.stats import EngineStats

# Of stretches that nobody has asked for: some seconds of prompts; what is older is forgotten.
_MAX_FRESH = 4096
# Share of the pool that stays free when blocks are lent to be written to.
_SPARE = 0.02


@dataclass(frozen=True, slots=True)
class Loan:
    """Blocks that are held for a copy.

    Attributes:
        hashes: of a sequence's blocks, in its order.
        blocks: one of each group of layers for the first of these, then for the next, and so on.
        num_cached: leading hashes whose blocks are cached, to be read; the others are to be written to.
        ready: when the device has done what it was asked for before the loan; None: it has.
    """

    hashes: tuple[bytes, ...]
    blocks: tuple[int, ...]
    num_cached: int
    ready: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive blocks of a sequence that can be found.

    Attributes:
        hashes: of the blocks.
        end: blocks of the sequence up to the last of them.
    """

    hashes: tuple[bytes, ...]
    end: int


class Lending:
    """See the module.

    Args:
        cache: the pool.
        blocks: its owner.
        copies: of the same pool, which tell when the device is done.
        stats: of the engine.
    """

    def __init__(self, cache: KVCache, blocks: BlockManager, copies: KVCopies, stats: EngineStats) -> None:
        self._blocks = blocks
        self._copies = copies
        self._host_copies = HostCopies(cache)
        self._num_groups = blocks.num_groups
        self._stats = stats
        self._num_spare = int(blocks.num_blocks * _SPARE) + 1
        self._size = 0
        self._fresh: deque[Stretch] = deque(maxlen=_MAX_FRESH)
        self.has_fresh = Event()

    @property
    def bytes_per_block(self) -> int:
        """Of one in each group."""
        return self._num_groups * self._host_copies.bytes_per_block

    @property
    def num_lanes(self) -> int:
        """Copies that may well be made at once."""
        return self._host_copies.num_lanes

    @property
    def pinned(self) -> PinnedMemory | None:
        """The host's memory that is copied from without a detour; None: there is no other way."""
        return self._host_copies.pinned

    @property
    def num_hit_tokens(self) -> int:
        """Tokens of blocks that came from outside and were found by a sequence, each block once. From any thread."""
        return self._blocks.num_brought_hits * self._blocks.block_size

    @property
    def prompt_costs(self) -> tuple[int, float]:
        """Prompt tokens that were computed since the start, and the seconds that took. From any thread, about right."""
        return self._stats.prompt_tokens, self._stats.prefill_s

    def watch(self, size: int) -> None:
        """Note stretches of so many blocks, counted from the start of each sequence, as they become findable."""
        self._size = size
        self._blocks.on_published = self._note

    def unwatch(self) -> None:
        """Note no more of them, and forget those that were noted. From any thread."""
        self._blocks.on_published = None
        self._fresh.clear()

    def take_fresh(self) -> list[Stretch]:
        """Those that became findable since this was last asked, except the oldest if they are many. From any thread."""
        self.has_fresh.clear()
        taken: list[Stretch] = []
        while self._fresh:
            taken.append(self._fresh.popleft())
        return taken

    def num_cached(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks of a sequence that are cached; from any thread, and out of date at once."""
        return self._blocks.num_cached(hashes)

    def num_usable(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that need not be computed; likewise."""
        return self._blocks.num_usable(hashes)

    def num_unread(self, num_blocks: int) -> int:
        """Leading blocks that nobody reads behind so many; from any thread."""
        return self._blocks.num_unread(num_blocks)

    def lend(self, hashes: Sequence[bytes]) -> Loan | None:
        """Hold these blocks to be read; None if some are cached no more."""
        if self._blocks.num_cached(hashes) < len(hashes):
            return None
        return self._loan(hashes, self._blocks.lend(hashes), [])

    def reserve(self, hashes: Sequence[bytes]) -> Loan | None:
        """Hold a sequence's blocks, the cached ones of them and blank ones to be written to; None if there are too few.

        The cached ones are held so that room is not made by giving them up.
        """
        cached = self._blocks.lend(hashes)
        blank = self._blocks.lend_blank(len(hashes) * self._num_groups - len(cached), self._num_spare)
        if blank is None:
            self._blocks.take_back(cached)
            return None
        return self._loan(hashes, cached, blank)

    def origins(self, loan: Loan) -> tuple[str | None, ...]:
        """For which requests the blocks of a loan were computed, all of them cached."""
        return self._blocks.origins(loan.blocks[:: self._num_groups])

    def bring(self, loan: Loan, origins: Iterable[str | None]) -> None:
        """The next blocks of a loan behind the cached ones are written, as many as there are origins."""
        size = self._num_groups
        for number, origin in enumerate(origins, loan.num_cached):
            self._blocks.bring(loan.blocks[number * size : (number + 1) * size], loan.hashes[number], origin)

    def give_back(self, loan: Loan) -> None:
        """The copy is done, or given up; what was brought stays findable. Once for each loan."""
        self._blocks.take_back(loan.blocks)

    def copy_out(self, loan: Loan, out: np.ndarray) -> float:
        """See `HostCopies.copy_out`, with a row for each hash. From any thread."""
        return self._host_copies.copy_out(loan.blocks, loan.ready, out)

    def copy_in(self, loan: Loan, first: int, data: np.ndarray) -> None:
        """Write blocks of a loan, from this one on, as many as there are rows. From any thread."""
        assert first >= loan.num_cached, "these are cached, and others may read them"
        blocks = loan.blocks[first * self._num_groups : (first + len(data)) * self._num_groups]
        self._host_copies.copy_in(blocks, loan.ready, data)

    def _loan(self, hashes: Sequence[bytes], cached: list[int], blank: list[int]) -> Loan:
        return Loan(tuple(hashes), (*cached, *blank), len(cached) // self._num_groups, self._copies.fence())

    def _note(self, hashes: Sequence[bytes], num_before: int, num_now: int) -> None:
        for end in range((num_before // self._size + 1) * self._size, num_now + 1, self._size):
            self._fresh.append(Stretch(tuple(hashes[end - self._size : end]), end))
            self.has_fresh.set()
