"""What a router knows of caches: bounded always, right after a snapshot, whatever was lost in between."""

import random
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.cache_log import CacheEvents, CacheLog, Position
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import GenerateRequest, SamplingParams
from deployments.routing.hashes import PromptHashes
from deployments.routing.index import PrefixIndex

SIZE = 4


def prompt(*tokens: int) -> PromptHashes:
    return PromptHashes(tokens)


def published(tokens: PromptHashes, block_size: int = SIZE, epoch: int = 1) -> CacheLog:
    log = CacheLog(epoch=epoch)
    for block in tokens.of(block_size):
        log.published(block)
    return log


def test_a_replica_has_the_prefix_that_its_engine_told_of_and_no_more() -> None:
    index = PrefixIndex()
    index.join("a", SIZE, 8)
    index.join("b", SIZE, 8)
    index.apply("a", published(prompt(*range(8))).since(None))
    assert index.match(prompt(*range(12)), 0.0) == {"a": 8}
    assert index.match(prompt(*range(4), 9, 9, 9, 9, 9), 0.0) == {"a": 4}
    assert index.match(prompt(*range(8)), 0.0) == {"a": 4}, "the last token is always computed"
    assert index.match(prompt(9, 9, 9, 9, 9), 0.0) == {}


def test_a_block_behind_one_that_is_gone_is_of_no_use() -> None:
    index, tokens = PrefixIndex(), prompt(*range(12))
    index.join("a", SIZE, 8)
    log = published(tokens)
    log.evicted(tokens.of(SIZE)[1])
    index.apply("a", log.since(None))
    assert index.match(prompt(*range(13)), 0.0) == {"a": 4}


def test_pools_with_blocks_of_other_sizes_are_matched_each_by_its_own() -> None:
    index, tokens = PrefixIndex(), prompt(*range(16))
    index.join("small", 4, 64)
    index.join("large", 8, 64)
    index.apply("small", published(tokens, 4).since(None))
    index.apply("large", published(tokens, 8).since(None))
    assert index.match(prompt(*range(15)), 0.0) == {"small": 12, "large": 8}


def test_what_was_sent_counts_at_once_and_is_forgotten_if_it_is_never_told_of() -> None:
    index = PrefixIndex(expected_for_s=60.0)
    index.join("a", SIZE, 8)
    index.join("b", SIZE, 8)
    index.expect("a", prompt(*range(8)), 100.0)
    index.expect("b", prompt(*range(8)), 110.0)
    assert index.match(prompt(*range(9)), 159.0) == {"a": 8, "b": 8}
    assert index.match(prompt(*range(9)), 160.0) == {"b": 8}
    assert index.match(prompt(*range(9)), 169.0) == {"b": 8}
    assert index.match(prompt(*range(9)), 170.0) == {}
    assert index.num_blocks == 0


def test_what_was_told_of_stays_when_the_expectation_ends() -> None:
    index, tokens = PrefixIndex(expected_for_s=60.0), prompt(*range(8))
    index.join("a", SIZE, 8)
    index.expect("a", tokens, 0.0)
    index.apply("a", published(tokens).since(None))
    assert index.match(prompt(*range(9)), 1000.0) == {"a": 8}


def test_what_is_not_computed_is_not_expected_any_more() -> None:
    index = PrefixIndex()
    index.join("a", SIZE, 8)
    index.expect("a", prompt(*range(8)), 0.0)
    index.disappoint("a", prompt(*range(8)))
    assert index.match(prompt(*range(9)), 0.0) == {}
    assert index.num_blocks == 0


def test_a_replica_that_is_gone_takes_with_it_what_it_had_and_another_takes_its_place() -> None:
    index, tokens = PrefixIndex(), prompt(*range(8))
    index.join("a", SIZE, 8)
    index.apply("a", published(tokens).since(None))
    index.leave("a")
    assert index.num_blocks == 0
    index.join("b", SIZE, 8)
    assert index.match(prompt(*range(9)), 0.0) == {}
    index.apply("a", published(tokens).since(None))
    assert index.match(prompt(*range(9)), 0.0) == {}, "a report that crossed its death"
    index.check_integrity()


def test_another_start_of_an_engine_has_another_cache() -> None:
    index, tokens = PrefixIndex(), prompt(*range(8))
    index.join("a", SIZE, 8)
    index.apply("a", published(tokens, epoch=1).since(None))
    index.apply("a", CacheLog(epoch=2).since(Position(2, 0)))
    assert index.match(prompt(*range(9)), 0.0) == {}


def test_after_a_loss_a_snapshot_is_asked_for_and_puts_all_right() -> None:
    index, first, second = PrefixIndex(), prompt(*range(4)), prompt(*range(10, 14))
    index.join("a", SIZE, 8)
    log = published(first)
    index.apply("a", log.since(None))
    read = index.position("a")
    log.evicted(first.of(SIZE)[0])  # lost
    middle = log.position
    log.published(second.of(SIZE)[0])
    index.apply("a", log.since(middle))
    assert index.position("a") is None
    assert index.match(prompt(*range(10, 15)), 0.0) == {"a": 4}, "what did come counts"
    index.apply("a", log.since(read))  # late: does not mend it
    assert index.position("a") is None
    index.apply("a", log.since(index.position("a")))
    assert index.position("a") == log.position
    assert index.match(prompt(*range(5)), 0.0) == {}


@dataclass
class Engine:
    """A real cache, and reports of it that are on their way."""

    blocks: BlockManager
    on_the_way: list[CacheEvents] = field(default_factory=list)
    pushed: Position | None = None


class Caches(RuleBasedStateMachine):
    """Any order of prompts, reports, losses, delays, restarts and deaths."""

    NAMES = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(max_blocks_per_replica=5, expected_for_s=10.0)
        self.engines = {name: Engine(BlockManager(6, SIZE)) for name in self.NAMES}
        self.now_s = 0.0

    @rule(name=st.sampled_from(NAMES), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def compute(self, name: str, tokens: list[int]) -> None:
        blocks = self.engines[name].blocks
        sequence = Sequence(GenerateRequest("r", tuple(tokens), SamplingParams(max_tokens=1)), Role.EXPORT, 0.0)
        if blocks.admit(sequence):
            sequence.receive(len(tokens))
            blocks.publish(sequence)
            blocks.free(sequence)

    @rule(name=st.sampled_from(NAMES), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def expect(self, name: str, tokens: list[int]) -> None:
        self.index.expect(name, PromptHashes(tokens), self.now_s)

    @rule(name=st.sampled_from(NAMES), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def disappoint(self, name: str, tokens: list[int]) -> None:
        self.index.disappoint(name, PromptHashes(tokens))

    @rule(name=st.sampled_from(NAMES))
    def tell(self, name: str) -> None:
        engine = self.engines[name]
        events = engine.blocks.cache_log.since(engine.pushed)
        engine.on_the_way.append(events)
        engine.pushed = events.end

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 99), is_lost=st.booleans())
    def deliver(self, name: str, seed: int, is_lost: bool) -> None:
        if on_the_way := self.engines[name].on_the_way:
            events = on_the_way.pop(random.Random(seed).randrange(len(on_the_way)))
            if not is_lost:
                self.index.apply(name, events)

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        self.engines[name].blocks = BlockManager(6, SIZE)

    @rule(name=st.sampled_from(NAMES), num_blocks=st.integers(1, 6))
    def join(self, name: str, num_blocks: int) -> None:
        self.index.join(name, SIZE, num_blocks)

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        self.index.leave(name)

    @rule(seconds=st.floats(0.0, 8.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def match(self, tokens: list[int]) -> None:
        found = self.index.match(PromptHashes(tokens), self.now_s)
        assert found.keys() <= set(self.index.replicas)
        assert all(0 < num_tokens < len(tokens) and num_tokens % SIZE == 0 for num_tokens in found.values())

    @precondition(lambda self: self.index.replicas)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def be_told_all(self, tokens: list[int]) -> None:
        """Expectations end, and every engine is asked from where it was read: what is known is true."""
        self.now_s += 10.0
        found_before = PromptHashes(tokens)
        for name in self.index.replicas:
            log = self.engines[name].blocks.cache_log
            self.index.apply(name, log.since(self.index.position(name)))
            assert self.index.position(name) == log.position
        found = self.index.match(found_before, self.now_s)
        for name in self.index.replicas:
            blocks = self.engines[name].blocks
            request = GenerateRequest("r", tuple(tokens), SamplingParams(max_tokens=1))
            truth = blocks.num_cached_prefix_blocks(Sequence(request, Role.EXPORT, 0.0)) * SIZE
            is_whole = len(list(blocks.cache_log.held)) <= self.index.max_blocks(name)
            assert found.get(name, 0) == truth if is_whole else found.get(name, 0) <= truth

    @invariant()
    def the_index_is_whole_and_bounded(self) -> None:
        self.index.check_integrity()
        assert self.index.num_blocks <= 2 * 5 * len(self.NAMES)


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
