"""Who owns which KV block. Reference counts, the prefix cache, and the order in which cached blocks are given up.

Knows block ids and token ids, nothing of tensors. Only full blocks are shared, and a sequence always computes at least
its last token into a block of its own, so that no block ever has to be copied. Where every layer has a window, a
sequence gives blocks back as it passes them, and is given blocks for a part of its tokens at a time.

Source: PagedAttention (Kwon et al., SOSP 2023); automatic prefix caching as in vLLM's design documents.
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Chain

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.block_hash import hash_block, root_of
from deployments.engine.scheduling.cache_log import CacheLog
from deployments.engine.scheduling.ids import block_array
from deployments.engine.scheduling.place import Place
from deployments.engine.scheduling.retention import Retention
from deployments.engine.scheduling.sequence import Sequence

# Hashes of a sequence's blocks, how many of them were published before, and how many are now.
OnPublished = Callable[[Chain[bytes], int, int], None]


class BlockManager:
    """Hands out the blocks of one KV pool.

    A block is blank (free, no content), cached (free, content still valid) or held (by sequences, or by who copies it).

    Attributes:
        num_brought_hits: blocks that came from outside and were found by a sequence, each once.
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
        self._prefix_caching = enable_prefix_caching
        self._blank = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._origin_of: dict[int, str | None] = {}  # for which request it was computed; None: long before
        self._lent: Counter[int] = Counter()
        self._brought: set[int] = set()  # from outside, and found by nobody yet
        self.num_brought_hits = 0
        self.on_published: OnPublished | None = None
        self.cache_log = CacheLog()

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
        num_passed, shared = self._match(sequence)
        return num_passed + len(shared)

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
        place = self._place(sequence, remote_threshold)
        if not self._fits(place, num_spare_blocks):
            return None
        for block in place.shared:
            self._hold(block)
        if self._brought:
            self.num_brought_hits += len(self._brought.intersection(place.shared))
            self._brought.difference_update(place.shared)
        blank = [self._take() for _ in range(place.num_new)]
        num_found = place.num_passed + len(place.shared)
        sequence.take_blocks(place.shared, blank, num_found * self.block_size, place.num_passed)
        return place

    def num_found_tokens(self, sequence: Sequence) -> int:
        """Leading tokens that `admit` found in the cache and that were not computed for this very request before.

        They were if it is resumed, or if an earlier attempt to hand it over has failed.
        """
        origin, num_passed = sequence.request.origin, sequence.num_passed_blocks
        found = sequence.block_table[num_passed : sequence.num_published_blocks]
        own = (number for number, block in enumerate(found) if self._origin_of[block] == origin)
        num_blocks = next(own, len(found))
        # Of those that were passed nobody knows: as the first one that is held.
        return (num_passed + num_blocks) * self.block_size if num_blocks else 0

    def append(self, sequence: Sequence, num_drafts: int = 0) -> bool:
        """Make room for the newest token and for drafts behind it; False, and nothing changed, if there is none."""
        num_tokens = sequence.num_tokens + num_drafts
        if num_tokens <= len(sequence.block_table) * self.block_size:
            return True
        num_new = self._num_missing(sequence, num_tokens)
        if num_new > self.num_free_blocks:
            return False
        sequence.add_blocks([self._take() for _ in range(num_new)])
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> int:
        """Make room for the next tokens of a prompt: for so many of these as there is room for now."""
        end = sequence.num_launched_tokens + num_tokens
        if end > len(sequence.block_table) * self.block_size:
            num_new = min(self._num_missing(sequence, end), self.num_free_blocks)
            sequence.add_blocks([self._take() for _ in range(num_new)])
        return min(end, len(sequence.block_table) * self.block_size) - sequence.num_launched_tokens

    def trim(self, sequence: Sequence) -> None:
        """Take back the blocks that were for drafts alone."""
        self._release(sequence.drop_surplus(self.blocks_for(sequence.num_tokens)))

    def publish(self, sequence: Sequence) -> None:
        """Offer full blocks to later sequences: computed, or they will be before a step that is started from now on.

        Those that no later token of the sequence sees are given back.
        """
        num_full = sequence.num_lasting_tokens // self.block_size
        if num_full > sequence.num_published_blocks and self._prefix_caching:
            self._offer(sequence, num_full)
        if self._retention.window is not None:
            self._release(sequence.pass_blocks(self._retention.num_passed(sequence.num_lasting_tokens)))

    def lacks_passed(self, sequence: Sequence) -> bool:
        """Whether its next token sees blocks that were passed."""
        return sequence.num_passed_blocks > self._retention.num_passed(sequence.num_launched_tokens)

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back; those that were published stay findable until they are needed."""
        self._release(sequence.drop_blocks())

    def num_cached(self, hashes: Chain[bytes]) -> int:
        """Leading ones of these blocks that are cached now. Safe from any thread; it may be out of date at once."""
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in self._block_of), len(hashes))

    def num_usable(self, hashes: Chain[bytes]) -> int:
        """Leading ones of these blocks that a sequence need not compute now; likewise from any thread."""
        return self._usable(hashes)[1]

    def num_unread(self, num_blocks: int) -> int:
        """Leading ones of so many blocks that nobody reads who goes on behind them; likewise."""
        return self._retention.num_passed(num_blocks * self.block_size)

    def lend(self, hashes: Chain[bytes]) -> list[int]:
        """Hold the leading ones of these blocks that are cached, until `take_back`; nobody may write to them."""
        blocks = [self._block_of[block_hash] for block_hash in hashes[: self.num_cached(hashes)]]
        for block in blocks:
            self._hold(block)
        self._lent.update(blocks)
        return blocks

    def lend_blank(self, num_blocks: int, num_spare_blocks: int = 0) -> list[int] | None:
        """Hold so many blocks to be written to, until `take_back`; None if too few are free beside the spare ones."""
        if num_blocks + num_spare_blocks > self.num_free_blocks:
            return None
        blocks = [self._take() for _ in range(num_blocks)]
        self._lent.update(blocks)
        return blocks

    def bring(self, block: int, block_hash: bytes, origin: str | None) -> None:
        """A lent block has KV from outside in it, and can be found from now on.

        Args:
            block: from `lend_blank`.
            block_hash: its name; if a twin was computed meanwhile, that one stays.
            origin: for which request it was computed; None: long before.
        """
        assert self._lent[block] and block not in self._hash_of, f"block {block} is not there to be written to"
        if block_hash not in self._block_of:
            self._enter(block, block_hash, origin)
            self._brought.add(block)

    def origins(self, blocks: Chain[int]) -> tuple[str | None, ...]:
        """For which requests these cached blocks were computed."""
        return tuple(self._origin_of[block] for block in blocks)

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
            held = sequence.block_table[sequence.num_passed_blocks :]
            assert len(set(held)) == len(held), f"{sequence.request_id}: block twice"
            for block in held:
                expected[block] += 1
            num_passed = self._retention.num_passed(max(sequence.num_lasting_tokens, sequence.num_prompt_tokens))
            assert sequence.num_passed_blocks <= num_passed, f"{sequence.request_id}: passed what it still sees"
        assert expected == self._ref_counts, f"reference counts {self._ref_counts}, held are {expected}"
        free = set(self._blank) | set(self._cached)
        assert len(free) == self.num_free_blocks, "a block is free twice"
        assert free == {b for b, count in enumerate(expected) if count == 0}, "free blocks are not the unheld ones"
        self._check_hashes()

    def _check_hashes(self) -> None:
        assert not any(b in self._hash_of for b in self._blank), "a blank block has a hash"
        assert all(b in self._hash_of for b in self._cached), "a cached block has no hash"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hash tables disagree"
        assert self._origin_of.keys() == self._hash_of.keys(), "a block is of no request, or of one without a hash"
        assert self._brought <= self._hash_of.keys(), "a block from outside cannot be found"
        assert set(self.cache_log.held) == self._block_of.keys(), "the log tells of other blocks than there are"

    def _enter(self, block: int, block_hash: bytes, origin: str | None) -> None:
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        self._origin_of[block] = origin
        self.cache_log.published(block_hash)

    def _offer(self, sequence: Sequence, num_full: int) -> None:
        hashes = self._hashes(sequence, num_full)
        for i in range(sequence.num_published_blocks, num_full):
            block = sequence.block_table[i]
            # A twin computed at the same time was first: keep that one, ours stays private.
            if hashes[i] not in self._block_of and block not in self._hash_of:
                is_new = (i + 1) * self.block_size > sequence.num_cached_tokens
                self._enter(block, hashes[i], sequence.request.origin if is_new else None)
        if (told := self.on_published) is not None:  # another thread may say that nobody is told any more
            told(hashes, sequence.num_published_blocks, num_full)
        sequence.note_published(num_full)

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks without which so many tokens have no room; if they are not there, passed ones are given back before.

        A step may be in flight behind which a sequence passes some, and that was not concluded.
        """
        num_missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing > self.num_free_blocks:
            self.publish(sequence)
        return num_missing

    def _place(self, sequence: Sequence, remote_threshold: int | None) -> Place:
        """What `admit` would give a sequence."""
        num_tokens, size = sequence.num_tokens, self.block_size
        first, shared = self._match(sequence)
        num_found = first + len(shared)
        is_awaited = remote_threshold is not None and num_tokens - num_found * size >= remote_threshold
        if is_awaited:
            num_passed, num_held = self._retention.num_passed(num_tokens), num_tokens
            shared, first = shared[max(0, num_passed - first) :], max(first, num_passed)
        else:
            num_held = self._retention.reach(num_tokens, num_found * size)
        num_new = self.blocks_for(num_held) - first - len(shared)
        if self._retention.window is not None:  # in a small pool it is computed in shorter steps
            num_new = min(num_new, self.num_blocks - len(shared))
        return Place(first, shared, num_new, num_found, is_awaited)

    def _fits(self, place: Place, num_spare_blocks: int) -> bool:
        num_shared_free = sum(1 for block in place.shared if self._ref_counts[block] == 0)
        return place.num_new + num_shared_free + num_spare_blocks <= self.num_free_blocks

    def _match(self, sequence: Sequence) -> tuple[int, list[int]]:
        """Of the longest prefix behind which a sequence can go on: blocks that it passes, and those that it shares."""
        if not self._prefix_caching or sequence.wants_scores:
            return 0, []
        max_blocks = (sequence.num_tokens - 1) // self.block_size  # the last token is always computed
        hashes = self._hashes(sequence, max_blocks)[:max_blocks]
        first, end = self._usable(hashes)
        return first, [self._block_of[block_hash] for block_hash in hashes[first:end]]

    def _usable(self, hashes: Chain[bytes]) -> tuple[int, int]:
        """Of a sequence with these blocks the first one that is read behind the longest usable prefix; and its end."""
        end = self._retention.longest_prefix(block_hash in self._block_of for block_hash in hashes)
        return self._retention.num_passed(end * self.block_size), end

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
                if block in self._hash_of:
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
            block_hash = self._hash_of.pop(block)
            del self._block_of[block_hash], self._origin_of[block]
            self._brought.discard(block)
            self.cache_log.evicted(block_hash)
        self._ref_counts[block] = 1
        return block


def build_blocks(limits: EngineLimits, *, enable_prefix_caching: bool) -> BlockManager:
    """Of the pool of an engine."""
    return BlockManager(
        limits.num_blocks,
        limits.block_size,
        enable_prefix_caching=enable_prefix_caching,
        retention=Retention.of(limits),
    )
