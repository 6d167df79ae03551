"""Who owns which KV block. Reference counts, the prefix cache, and the order in which cached blocks are given up.

Knows block ids and token ids, nothing of tensors. Only full blocks are shared, and a sequence always computes at least
its last token into a block of its own, so that no block ever has to be copied.

A block holds some tokens in one group of layers, so a sequence has a table for each group; all groups take blocks from
the same ones. In groups with a window it gives blocks back as it passes them, and is given blocks for a part of its
tokens at a time.

Source: PagedAttention (Kwon et al., SOSP 2023); automatic prefix caching as in vLLM's design documents.
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Chain
from itertools import chain

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.block_hash import hash_block, root_of
from deployments.engine.scheduling.cache_log import CacheLog
from deployments.engine.scheduling.ids import block_array
from deployments.engine.scheduling.place import Place
from deployments.engine.scheduling.prefix_cache import PrefixCache
from deployments.engine.scheduling.retention import Retention
from deployments.engine.scheduling.sequence import Sequence

# Hashes of a sequence's blocks, how many of them were published before, and how many are now.
OnPublished = Callable[[Chain[bytes], int, int], None]


class BlockManager:
    """Hands out the blocks of one KV pool.

    A block is blank (free, no content), cached (free, content still valid) or held (by sequences, or by who copies it).

    Attributes:
        num_groups: of layers.
        on_published: told of each sequence's full blocks, as they become findable; None: nobody is.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        retention: Retention | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._retention = retention or Retention(block_size)
        self.num_groups = len(self._retention.windows)
        self._has_windows = self._retention.window is not None
        self._prefix_caching = enable_prefix_caching
        self._blank = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._ref_counts = [0] * num_blocks
        self._prefixes = PrefixCache(self._retention)
        self._named = self._prefixes.named
        self._lent: Counter[int] = Counter()
        self.on_published: OnPublished | None = None

    @property
    def cache_log(self) -> CacheLog:
        return self._prefixes.log

    @property
    def num_brought_hits(self) -> int:
        """Blocks of the first group that came from outside and were found by a sequence, each once."""
        return self._prefixes.num_brought_hits

    @property
    def num_free_blocks(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_held_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_cached_prefix_blocks(self, sequence: Sequence) -> int:
        """Leading blocks of a sequence that need not be computed, by what the cache holds; never all of its tokens."""
        return len(self._match(sequence)[1])

    def can_admit(self, sequence: Sequence, num_spare_blocks: int = 0, remote_threshold: int | None = None) -> bool:
        """Whether `admit` would succeed now."""
        return self._fits(self._place(sequence, remote_threshold), num_spare_blocks)

    def admit(self, sequence: Sequence, num_spare_blocks: int = 0, remote_threshold: int | None = None) -> Place | None:
        """Give a sequence blocks for its tokens, shared ones first.

        For all of them, but where it will pass blocks while it is computed: see `Retention.reach`, and `extend`.

        Args:
            sequence: holds no blocks yet; what was found in the cache counts as computed.
            num_spare_blocks: blocks that must stay free afterwards.
            remote_threshold: with at least so many tokens that were not found, a prefill engine computes its prompt: it
                is given blocks for all that is read behind the prompt, and what is not counts as computed.

        Returns:
            None, and nothing changed, if there are too few free blocks.
        """
        assert not sequence.block_table, f"{sequence.request_id} already holds blocks"
        if not self._fits(place := self._place(sequence, remote_threshold), num_spare_blocks):
            return None
        for block in chain.from_iterable(place.shared):
            self._hold(block)
        self._prefixes.note_found(place.shared[0])
        blocks = [shared + self._take_some(count) for shared, count in zip(place.shared, place.num_new, strict=True)]
        sequence.take_blocks(blocks, self._retention.num_full, place, self.block_size)
        return place

    def num_found_tokens(self, sequence: Sequence) -> int:
        """Leading tokens that `admit` found in the cache and that were not computed for this very request before.

        They were if it is resumed, or if an earlier attempt to hand it over has failed.
        """
        origin, num_unread = sequence.request.origin, sequence.tables.num_unread
        found = sequence.block_table[num_unread : sequence.num_published_blocks]
        own = (number for number, block in enumerate(found) if self._prefixes.origin_of(block) == origin)
        num_blocks = next(own, len(found))
        # Of those that were passed nobody knows: as the first one that is held.
        return (num_unread + num_blocks) * self.block_size if num_blocks else 0

    def append(self, sequence: Sequence, num_drafts: int = 0) -> bool:
        """Make room for the newest token and for drafts behind it; False, and nothing changed, if there is none."""
        table = sequence.block_table if self.num_groups == 1 else sequence.tables.each[-1]
        if sequence.num_tokens + num_drafts <= len(table) * self.block_size:
            return True
        missing = self._missing(sequence, self.blocks_for(sequence.num_tokens + num_drafts))
        if sum(missing) > self.num_free_blocks:
            return False
        sequence.tables.add(map(self._take_some, missing))
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        """Make room for the next tokens of a prompt: for so many of these as there is room for now."""
        tables, end = sequence.tables, sequence.num_launched_tokens + num_tokens
        if end > tables.num_blocks * self.block_size:
            num_blocks = self.blocks_for(end)
            missing = self._missing(sequence, num_blocks)
            while sum(missing) > self.num_free_blocks:
                num_blocks -= 1
                missing = tables.missing(num_blocks)
            tables.add(map(self._take_some, missing))
        return min(end, tables.num_blocks * self.block_size) - sequence.num_launched_tokens

    def trim(self, sequence: Sequence) -> None:
        """Take back the blocks that were for drafts alone; not those of drafts in flight."""
        self._release(sequence.tables.drop_surplus(self.blocks_for(sequence.num_reached_tokens)))

    def publish(self, sequence: Sequence) -> None:
        """Offer full blocks to later sequences: computed, or they will be before a step that is started from now on.

        Those that no later token of the sequence sees are given back.
        """
        num_full = sequence.num_lasting_tokens // self.block_size
        if num_full > sequence.num_published_blocks and self._prefix_caching:
            self._offer(sequence, num_full)
        if self._has_windows:
            self._release(sequence.tables.pass_blocks(self._retention.num_passed(sequence.num_lasting_tokens)))

    def lacks_passed(self, sequence: Sequence) -> bool:
        """Whether its next token sees blocks that were passed."""
        return sequence.tables.num_passed > self._retention.num_passed(sequence.num_launched_tokens)

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back; those that were published stay findable until they are needed."""
        self._release(sequence.drop_blocks())

    def num_cached(self, hashes: Chain[bytes]) -> int:
        """Leading ones of these that are cached now in all groups. Safe from any thread; it may be out of date."""
        return self._prefixes.num_cached(hashes)

    def num_usable(self, hashes: Chain[bytes]) -> int:
        """Leading ones of these blocks that a sequence need not compute now; likewise from any thread."""
        return self._prefixes.usable(hashes)[1]

    def num_unread(self, num_blocks: int) -> int:
        """Leading ones of so many blocks that nobody reads in any group who goes on behind them; likewise."""
        return self._retention.num_unread(num_blocks * self.block_size)

    def lend(self, hashes: Chain[bytes]) -> list[int]:
        """Hold the leading ones of these that are cached, until `take_back`; nobody may write to them.

        Returns:
            The blocks of all groups for the first of them, then those for the next, and so on.
        """
        by_group = self._prefixes.blocks_of(hashes[: self.num_cached(hashes)])
        blocks = list(chain.from_iterable(zip(*by_group, strict=True)))
        for block in blocks:
            self._hold(block)
        self._lent.update(blocks)
        return blocks

    def lend_blank(self, num_blocks: int, num_spare_blocks: int = 0) -> list[int] | None:
        """Hold so many blocks to be written to, until `take_back`; None if too few are free beside the spare ones."""
        if num_blocks + num_spare_blocks > self.num_free_blocks:
            return None
        blocks = self._take_some(num_blocks)
        self._lent.update(blocks)
        return blocks

    def bring(self, blocks: Chain[int], block_hash: bytes, origin: str | None) -> None:
        """Lent blocks have KV from outside in them, and can be found from now on.

        Args:
            blocks: from `lend_blank`, one of each group.
            block_hash: their name; if a twin was computed meanwhile, that one stays.
            origin: for which request they were computed; None: long before.
        """
        assert all(self._lent[b] and b not in self._named for b in blocks), f"{blocks} are not there to be written to"
        self._prefixes.bring(blocks, block_hash, origin)

    def origins(self, blocks: Chain[int]) -> tuple[str | None, ...]:
        """For which requests these cached blocks were computed."""
        return tuple(map(self._prefixes.origin_of, blocks))

    def take_back(self, blocks: Chain[int]) -> None:
        """Whoever copied them is done."""
        self._lent.subtract(blocks)
        assert min(self._lent.values(), default=0) >= 0, "a block was taken back that was not lent"
        self._lent += Counter()  # without those that are lent no more
        self._release(block_array(blocks))

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every block is accounted for exactly once.

        Args:
            sequences: all that hold blocks.
        """
        expected = [self._lent[block] for block in range(self.num_blocks)]
        for sequence in sequences:
            held = list(chain.from_iterable(sequence.tables.held()))
            assert len(set(held)) == len(held), f"{sequence.request_id}: block twice"
            for block in held:
                expected[block] += 1
            num_passed = self._retention.num_passed(max(sequence.num_lasting_tokens, sequence.num_prompt_tokens))
            assert sequence.num_passed_blocks <= num_passed, f"{sequence.request_id}: passed what it still sees"
        assert expected == self._ref_counts, f"reference counts {self._ref_counts}, held are {expected}"
        free = set(self._blank) | set(self._cached)
        assert len(free) == self.num_free_blocks, "a block is free twice"
        assert free == {b for b, count in enumerate(expected) if count == 0}, "free blocks are not the unheld ones"
        self._prefixes.check_integrity(self._blank, self._cached)

    def _offer(self, sequence: Sequence, num_full: int) -> None:
        hashes, tables = self._hashes(sequence, num_full), sequence.tables
        spans = tables.spans(range(sequence.num_published_blocks, num_full), tables.num_passed)
        for group, (table, span) in enumerate(zip(tables.each, spans, strict=True)):
            for i in span:
                is_new = (i + 1) * self.block_size > sequence.num_cached_tokens
                # A twin computed at the same time was first: keep that one, ours stays private.
                self._prefixes.enter(group, table[i], hashes[i], sequence.request.origin if is_new else None)
        if (told := self.on_published) is not None:  # another thread may say that nobody is told any more
            told(hashes, sequence.num_published_blocks, num_full)
        sequence.note_published(num_full)

    def _missing(self, sequence: Sequence, num_blocks: int) -> list[int]:
        """Blocks that each group lacks of so many; if they are not there, passed ones are given back before.

        A step may be in flight behind which a sequence passes some, and that was not concluded.
        """
        missing = sequence.tables.missing(num_blocks)
        if sum(missing) > self.num_free_blocks:
            self.publish(sequence)
        return missing

    def _place(self, sequence: Sequence, remote_threshold: int | None) -> Place:
        """What `admit` would give a sequence."""
        num_tokens, size = sequence.num_tokens, self.block_size
        num_passed, names = self._match(sequence)
        num_found = num_ready = len(names)
        is_awaited = remote_threshold is not None and num_tokens - num_found * size >= remote_threshold
        reach = self._retention.reach(num_tokens, num_found * size)
        if is_awaited:
            num_passed, reach = max(num_passed, self._retention.num_passed(num_tokens)), num_tokens
            num_ready = max(num_found, self._retention.num_unread(num_tokens))
        shared = self._prefixes.blocks_of(names, num_passed)
        num_new = self._num_new(shared, self.blocks_for(num_tokens), self.blocks_for(reach) - num_passed)
        return Place(num_passed, shared, num_new, num_found, num_ready, is_awaited)

    def _num_new(self, shared: list[list[int]], num_full: int, num_windowed: int) -> list[int]:
        """Blank blocks beside shared ones, for so many in each group that keeps all, and in each with a window."""
        full = [num_full - len(blocks) for blocks in shared[: self._retention.num_full]]
        windowed = [num_windowed - len(blocks) for blocks in shared[len(full) :]]
        if windowed:  # in a small pool it is computed in shorter steps
            room = self.num_blocks - sum(map(len, shared)) - sum(full)
            windowed = [min(count, room // len(windowed)) for count in windowed]
        return full + windowed

    def _fits(self, place: Place, num_spare_blocks: int) -> bool:
        num_shared_free = sum(self._ref_counts[block] == 0 for block in chain.from_iterable(place.shared))
        return sum(place.num_new) + num_shared_free + num_spare_blocks <= self.num_free_blocks

    def _match(self, sequence: Sequence) -> tuple[int, list[bytes]]:
        """The longest prefix behind which a sequence can go on: blocks of it that it passes within windows, and all."""
        if not self._prefix_caching or sequence.wants_scores:
            return 0, []
        max_blocks = (sequence.num_tokens - 1) // self.block_size  # the last token is always computed
        first, end = self._prefixes.usable(hashes := self._hashes(sequence, max_blocks)[:max_blocks])
        return first, hashes[:end]

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else root_of(sequence.position_offset, sequence.request.cache_salt)
            sequence.add_hash(hash_block(parent, sequence.token_ids[start : start + size]))
        return hashes

    def _release(self, blocks: "array[int]") -> None:
        for block in reversed(blocks):  # the tail of a prefix is the first to be given up
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} freed twice"
            if self._ref_counts[block] == 0:
                if block in self._named:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def _hold(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def _take(self) -> int:
        if self._blank:
            block = self._blank.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._prefixes.forget(block)
        self._ref_counts[block] = 1
        return block

    def _take_some(self, count: int) -> list[int]:
        return [self._take() for _ in range(count)]


def build_blocks(limits: EngineLimits, *, enable_prefix_caching: bool) -> BlockManager:
    """Of the pool of an engine."""
    return BlockManager(
        limits.num_blocks,
        limits.block_size,
        enable_prefix_caching=enable_prefix_caching,
        retention=Retention.of(limits),
    )
