"""Blocks are counted exactly once, and a prefix is found only where it really lies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.engine.scheduling.block_hash import hash_block, hash_chain, root_of
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.retention import Retention
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import DrawnToken, GenerateRequest, SamplingParams

BLOCK_SIZE = 4


def sequence(tokens: list[int] | range, role: Role = Role.EXPORT) -> Sequence:
    """Of a prefill engine, unless said otherwise: no token that is drawn joins it."""
    return Sequence(GenerateRequest("r", tuple(tokens), SamplingParams(max_tokens=1000)), role, 0.0)


def compute(manager: BlockManager, chosen: Sequence, count: int, token: int = 0) -> None:
    """Run the next tokens of a sequence that holds blocks; the last one draws this token."""
    if not chosen.block_table:
        assert manager.admit(chosen)
        chosen.start()
    run = ScheduledSequence.of(chosen, count)
    chosen.begin(run)
    chosen.conclude(run, (DrawnToken(token),) * run.num_draws)
    manager.publish(chosen)
    chosen.check_integrity(BLOCK_SIZE)


def computed(manager: BlockManager, tokens: list[int] | range) -> Sequence:
    """A sequence that was admitted and whose tokens are all computed."""
    new = sequence(tokens)
    assert manager.admit(new)
    new.start()
    compute(manager, new, new.num_remaining_tokens)
    return new


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=8, block_size=BLOCK_SIZE)


def test_a_hash_is_the_same_in_every_process() -> None:
    first = hash_block(b"", [1, 2, 3, 4])
    assert first.hex() == "5c3887ef44b86da26265cb5c108a056b"
    assert hash_block(first, [1, 2, 3, 4]) != first, "what comes before a block is part of it"


def test_what_has_another_salt_is_not_shared(manager: BlockManager) -> None:
    def with_salt(salt: str, position_offset: int = 0) -> Sequence:
        request = replace(sequence(range(9)).request, cache_salt=salt)
        return Sequence(request, Role.LOCAL, 0.0, position_offset=position_offset)

    def num_found(new: Sequence) -> int:
        """Tokens that were found; afterwards all of its own can be."""
        assert manager.admit(new)
        found = new.num_computed_tokens
        new.start()
        compute(manager, new, new.num_remaining_tokens)
        manager.free(new)
        return found

    for salt, position_offset in (("", 0), ("a", 0), ("b", 0), ("a", 7)):
        assert num_found(with_salt(salt, position_offset)) == 0
        assert num_found(with_salt(salt, position_offset)) == 8


def test_a_sequence_gets_as_many_blocks_as_its_tokens_need(manager: BlockManager) -> None:
    new = sequence(range(9))
    assert manager.admit(new)
    assert len(new.block_table) == 3
    assert manager.num_held_blocks == 3


def test_a_block_is_added_when_the_newest_token_crosses_a_border(manager: BlockManager) -> None:
    new = sequence(range(7), Role.LOCAL)
    for length, num_blocks in [(8, 2), (9, 3)]:
        compute(manager, new, new.num_remaining_tokens if new.block_table else 7)
        assert manager.append(new)
        assert (len(new.token_ids), len(new.block_table)) == (length, num_blocks)


def test_append_fails_when_nothing_is_free_and_changes_nothing(manager: BlockManager) -> None:
    new = sequence(range(32), Role.LOCAL)
    compute(manager, new, 32)
    assert not manager.append(new)
    assert len(new.block_table) == 8


def test_a_finished_prefix_is_found_again(manager: BlockManager) -> None:
    first = computed(manager, range(10))
    shared = first.block_table[:2]
    manager.free(first)
    again = sequence(range(12))
    assert manager.num_cached_prefix_blocks(again) == 2
    assert manager.admit(again)
    assert again.block_table[:2] == shared
    assert again.num_computed_tokens == 8


def test_the_last_token_is_computed_even_if_all_blocks_are_cached(manager: BlockManager) -> None:
    manager.free(computed(manager, range(8)))
    again = sequence(range(8))
    assert manager.admit(again)
    assert again.num_computed_tokens == 4


def test_blocks_that_are_not_computed_yet_are_not_found(manager: BlockManager) -> None:
    compute(manager, sequence(range(12)), 7)
    assert manager.num_cached_prefix_blocks(sequence(range(12))) == 1


def test_running_sequences_share_a_prefix_until_the_last_one_ends(manager: BlockManager) -> None:
    first = computed(manager, range(8))
    second = computed(manager, range(9))
    assert second.block_table[:2] == first.block_table
    manager.free(first)
    assert manager.num_held_blocks == 3
    manager.check_integrity([second])
    manager.free(second)
    assert manager.num_free_blocks == 8


def test_a_refused_admission_changes_nothing(manager: BlockManager) -> None:
    manager.free(computed(manager, range(8)))  # two cached blocks, which the next one would share
    held = computed(manager, range(100, 120))
    large = sequence(list(range(8)) + list(range(50, 56)))
    assert not manager.can_admit(large)
    assert not manager.admit(large)
    assert not large.block_table and large.num_computed_tokens == 0
    manager.check_integrity([held])
    assert manager.num_cached_prefix_blocks(large) == 2


def test_cached_blocks_that_are_shared_do_not_count_as_free_for_the_rest(manager: BlockManager) -> None:
    manager.free(computed(manager, range(16)))
    held = computed(manager, range(100, 112))  # 3 blocks; 5 are free, 4 of them cached
    again = sequence(list(range(16)) + [7] * 8)  # 4 shared, 2 new
    assert not manager.admit(again)
    manager.check_integrity([held])


def test_spare_blocks_stay_free(manager: BlockManager) -> None:
    assert not manager.admit(sequence(range(28)), num_spare_blocks=2)
    assert manager.admit(sequence(range(28)), num_spare_blocks=1)


def test_the_oldest_cached_block_goes_first_and_within_a_prefix_its_tail(manager: BlockManager) -> None:
    old, young = computed(manager, range(12)), computed(manager, range(100, 112))
    manager.free(old)
    manager.free(young)  # 6 cached, 2 blank
    filler = computed(manager, [5] * 12)  # both blanks and the tail of the old prefix
    assert manager.num_cached_prefix_blocks(sequence(range(13))) == 2
    assert manager.num_cached_prefix_blocks(sequence(range(100, 113))) == 3
    manager.check_integrity([filler])


def test_twins_computed_at_the_same_time_keep_their_own_blocks(manager: BlockManager) -> None:
    twins = [sequence(range(6)), sequence(range(6))]
    for twin in twins:
        assert manager.admit(twin)
        twin.start()
    for twin in twins:
        compute(manager, twin, 6)
    manager.check_integrity(twins)
    for twin in twins:
        manager.free(twin)
    manager.check_integrity([])
    assert manager.num_free_blocks == 8


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(8, BLOCK_SIZE, enable_prefix_caching=False)
    manager.free(computed(manager, range(12)))
    assert manager.num_cached_prefix_blocks(sequence(range(12))) == 0


def chain(tokens: list[int] | range) -> list[bytes]:
    return hash_chain(root_of(0), tokens, BLOCK_SIZE)


def test_what_was_brought_is_found_and_counts_once_as_such(manager: BlockManager) -> None:
    hashes = chain(range(8))
    blocks = manager.lend_blank(2)
    assert blocks is not None
    assert manager.num_cached(hashes) == 0, "nobody has written to them yet"
    for block, block_hash in zip(blocks, hashes, strict=True):
        manager.bring([block], block_hash, "elsewhere")
    manager.take_back(blocks)
    for num_hits in (2, 2):
        found = sequence(range(9))
        assert manager.admit(found)
        assert (found.num_computed_tokens, manager.num_brought_hits) == (8, num_hits)
        manager.free(found)
    manager.check_integrity([])


def test_what_was_brought_for_a_request_that_had_computed_it_is_not_cached_for_it(manager: BlockManager) -> None:
    blocks = manager.lend_blank(2)
    assert blocks is not None
    for block, block_hash, origin in zip(blocks, chain(range(8)), (None, "r"), strict=True):
        manager.bring([block], block_hash, origin)
    assert manager.origins(blocks) == (None, "r")
    manager.take_back(blocks)
    found = sequence(range(9))
    assert manager.admit(found)
    assert (found.num_computed_tokens, manager.num_found_tokens(found)) == (8, 4)


def test_a_lent_block_is_not_given_away_until_it_is_taken_back(manager: BlockManager) -> None:
    manager.free(computed(manager, range(12)))
    lent = manager.lend(chain(range(12)))
    assert len(lent) == 3
    assert not manager.can_admit(sequence([5] * 24)), "5 of 8 blocks are free"
    manager.take_back(lent)
    assert manager.can_admit(sequence([5] * 24))


def test_a_twin_that_was_computed_meanwhile_stays(manager: BlockManager) -> None:
    blocks = manager.lend_blank(1)
    assert blocks is not None
    twin = computed(manager, range(5))
    manager.bring([blocks[0]], chain(range(4))[0], None)
    manager.take_back(blocks)
    assert manager.lend(chain(range(4))) == [twin.block_table[0]]
    manager.take_back(twin.block_table[:1])
    manager.check_integrity([twin])


class Blocks(RuleBasedStateMachine):
    """Any order of admissions, computations, growth and ends; beside it, what each block really holds."""

    retention = Retention(BLOCK_SIZE)
    num_blocks = 10

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(self.num_blocks, BLOCK_SIZE, retention=self.retention)
        self.num_groups = len(self.retention.windows)
        self.live: list[Sequence] = []
        self.content: dict[int, tuple[int, tuple[int, ...]]] = {}  # of which group, and the tokens up to its end
        self.loans: list[list[int]] = []
        self.unwritten: list[tuple[list[int], tuple[int, ...]]] = []  # lent blocks, and the tokens that are to come

    # Two tokens only, so that prefixes meet often.
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20), spare=st.integers(0, 2))
    def admit(self, tokens: list[int], spare: int) -> None:
        new, free = sequence(tokens, Role.LOCAL), self.manager.num_free_blocks
        fits = self.manager.can_admit(new, spare)
        assert (self.manager.admit(new, spare) is not None) is fits
        if not fits:
            assert self.manager.num_free_blocks == free
            return
        assert self.manager.num_free_blocks >= spare
        assert new.num_remaining_tokens >= 1
        new.start()
        for group, i, block in held_of(new, new.num_computed_tokens // BLOCK_SIZE):
            found = group, tuple(tokens[: (i + 1) * BLOCK_SIZE])
            assert self.content[block] == found, "the cache gave a block with other tokens, or of another group"
        self.live.append(new)

    @rule(data=st.data(), count=st.integers(1, 9), token=st.integers(0, 1))
    def compute_some(self, data: st.DataObject, count: int, token: int) -> None:
        """Of a prompt, or the newest token, which draws the next one: with it the sequence grows."""
        if self.live:
            chosen = data.draw(st.sampled_from(self.live))
            count = self.manager.extend(chosen, min(count, chosen.num_remaining_tokens))
            if count:
                with self.noting(chosen):
                    compute(self.manager, chosen, count, token)

    @rule(data=st.data(), drafts=st.lists(st.integers(0, 1), min_size=1, max_size=9), wrong=st.integers(0, 9))
    def speculate(self, data: st.DataObject, drafts: list[int], wrong: int) -> None:
        """Compute drafts too, of which one may be wrong: KV behind it is nobody's."""
        decoding = [s for s in self.live if s.num_remaining_tokens == 1]
        if not decoding:
            return
        chosen = data.draw(st.sampled_from(decoding))
        num_blocks = [len(table) for table in chosen.tables.each]
        if not self.manager.append(chosen, len(drafts)):
            assert [len(table) for table in chosen.tables.each] == num_blocks
            return
        run = ScheduledSequence.of(chosen, 1, tuple(drafts))
        right = [draft if i != wrong else 1 - draft for i, draft in enumerate(drafts)]
        with self.noting(chosen):
            chosen.begin(run)
            self.manager.publish(chosen)
            drawn = [*right, 0][: run.num_counted([*right, 0], 0)]
            assert len(chosen.conclude(run, tuple(map(DrawnToken, drawn)))) == min(wrong, len(drafts)) + 1
            self.manager.publish(chosen)
            self.manager.trim(chosen)
        most = max(*num_blocks, self.manager.blocks_for(chosen.num_tokens))
        assert max(len(table) for table in chosen.tables.each) <= most

    @contextmanager
    def noting(self, chosen: Sequence) -> Iterator[None]:
        """What is computed meanwhile, in the blocks that were there before: one that is passed by then is cached."""
        held = held_of(chosen, chosen.tables.num_blocks)
        yield
        for group, i, block in held:
            if i < chosen.num_computed_tokens // BLOCK_SIZE:
                self.content[block] = group, tuple(chosen.token_ids[: (i + 1) * BLOCK_SIZE])

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.live:
            chosen = data.draw(st.sampled_from(self.live))
            self.live.remove(chosen)
            self.manager.free(chosen)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=BLOCK_SIZE, max_size=20))
    def lend(self, tokens: list[int]) -> None:
        """Somebody copies what is cached of a prompt."""
        blocks = self.manager.lend(chain(tokens))
        for place, block in enumerate(blocks):
            i, group = divmod(place, self.num_groups)
            lent = group, tuple(tokens[: (i + 1) * BLOCK_SIZE])
            assert self.content[block] == lent, "a block with other tokens was lent, or of another group"
        self.loans.append(blocks)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=BLOCK_SIZE, max_size=20), spare=st.integers(0, 2))
    def reserve(self, tokens: list[int], spare: int) -> None:
        """Somebody will bring what is not cached of a prompt."""
        cached = self.manager.lend(chain(tokens))
        free, size = self.manager.num_free_blocks, self.num_groups
        num_blank = len(tokens) // BLOCK_SIZE * size - len(cached)
        blank = self.manager.lend_blank(num_blank, spare)
        assert (blank is None) == (num_blank + spare > free)
        self.loans.append(cached + (blank or []))
        for first in range(0, len(blank or []), size):
            blocks = (blank or [])[first : first + size]
            for block in blocks:
                self.content.pop(block, None)
            self.unwritten.append((blocks, tuple(tokens[: ((len(cached) + first) // size + 1) * BLOCK_SIZE])))

    @rule(data=st.data())
    def bring(self, data: st.DataObject) -> None:
        if self.unwritten:
            blocks, tokens = data.draw(st.sampled_from(self.unwritten))
            self.unwritten.remove((blocks, tokens))
            self.content |= {block: (group, tokens) for group, block in enumerate(blocks)}
            self.manager.bring(blocks, chain(list(tokens))[-1], None)

    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        if self.loans:
            loan = data.draw(st.sampled_from(self.loans))
            self.loans.remove(loan)
            self.unwritten = [(blocks, tokens) for blocks, tokens in self.unwritten if blocks[0] not in loan]
            self.manager.take_back(loan)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.manager.check_integrity(self.live)
        for live in self.live:
            live.check_integrity(BLOCK_SIZE)

    def teardown(self) -> None:
        for left in self.live:
            self.manager.free(left)
        for loan in self.loans:
            self.manager.take_back(loan)
        self.manager.check_integrity([])
        assert self.manager.num_free_blocks == self.num_blocks


class WindowedBlocks(Blocks):
    """The same where a token sees six: blocks behind are given back, and need not be there for a prefix to be found."""

    retention = Retention(BLOCK_SIZE, (6,), 9)

    @invariant()
    def nothing_is_held_behind_the_window_of_the_next_token(self) -> None:
        for live in self.live:
            behind = (live.num_computed_tokens - 6 + 1) // BLOCK_SIZE
            assert live.num_passed_blocks == max(0, behind)


class MixedBlocks(WindowedBlocks):
    """The same of three groups of layers that share one pool, of which one keeps all."""

    retention = Retention(BLOCK_SIZE, (None, 6, 6), 9)
    num_blocks = 26


def held_of(chosen: Sequence, num_blocks: int) -> list[tuple[int, int, int]]:
    """Group, place in the sequence, and block, of all that it holds of so many leading blocks."""
    spans = chosen.tables.spans(range(num_blocks), chosen.num_passed_blocks)
    return [(group, i, chosen.tables.each[group][i]) for group, span in enumerate(spans) for i in span]


TestBlocks, TestWindowedBlocks, TestMixedBlocks = Blocks.TestCase, WindowedBlocks.TestCase, MixedBlocks.TestCase
for case in (TestBlocks, TestWindowedBlocks, TestMixedBlocks):
    case.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
