"""A reader of a cache's changes knows what is there, from wherever it reads on."""

import hypothesis.strategies as st
from hypothesis import given, settings

from deployments.engine.scheduling.cache_log import CacheLog, Position


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_a_reader_is_given_what_came_since() -> None:
    log = CacheLog(epoch=1)
    log.published(name(1))
    read = log.position
    log.published(name(2))
    log.evicted(name(1))
    events = log.since(read)
    assert not events.is_snapshot
    assert events.changes == ((name(2), True), (name(1), False))
    assert events.start == read.count
    assert log.since(log.position).changes == ()


def test_whoever_has_read_nothing_or_another_start_is_given_all_that_is_there() -> None:
    log = CacheLog(epoch=1)
    log.published(name(1))
    log.published(name(2))
    log.evicted(name(1))
    for read in (None, Position(2, 3), Position(1, 4)):
        events = log.since(read)
        assert events.is_snapshot
        assert events.changes == ((name(2), True),)


def test_two_starts_of_an_engine_have_different_epochs() -> None:
    assert CacheLog().position.epoch != CacheLog().position.epoch


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=60), st.integers(0, 8))
def test_a_reader_knows_the_cache_however_seldom_it_reads(moves: list[tuple[int, bool]], max_changes: int) -> None:
    log, truth = CacheLog(max_changes, epoch=1), set[bytes]()
    known, read = set[bytes](), None
    for number, is_read in moves:
        block = name(number)
        if block in truth:
            log.evicted(block)
            truth.remove(block)
        else:
            log.published(block)
            truth.add(block)
        if is_read:
            events = log.since(read)
            known = set() if events.is_snapshot else known
            for changed, is_there in events.changes:
                known = known | {changed} if is_there else known - {changed}
            read = events.end
            assert known == truth
    assert set(log.held) == truth
