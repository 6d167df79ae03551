"""The arithmetic of windows in blocks, beside what it says counted token by token."""

import hypothesis.strategies as st
from hypothesis import given

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.retention import Retention

windowed = st.builds(Retention, st.integers(1, 9), st.integers(1, 30), st.integers(1, 12))
any_retention = st.one_of(windowed, st.builds(Retention, st.integers(1, 9)))


def seen_blocks(retention: Retention, position: int) -> set[int]:
    first = 0 if retention.window is None else max(0, position - retention.window + 1)
    return {token // retention.block_size for token in range(first, position + 1)}


@given(any_retention, st.integers(0, 100))
def test_passed_blocks_are_those_that_no_token_from_here_on_sees(retention: Retention, position: int) -> None:
    assert retention.num_passed(position) == min(seen_blocks(retention, position))


@given(any_retention, st.integers(1, 100))
def test_as_many_blocks_are_needed_as_one_token_sees_at_most(retention: Retention, num_tokens: int) -> None:
    most = max(len(seen_blocks(retention, position)) for position in range(num_tokens))
    spare = 0 if retention.window is None else 1  # where the last tokens begin a block is not looked at
    assert most <= retention.least_blocks(num_tokens) <= most + spare


@given(windowed, st.integers(1, 100), st.integers(0, 99))
def test_a_sequence_begins_with_what_it_holds_at_once_or_less(retention: Retention, length: int, found: int) -> None:
    num_found = min(found, length - 1) // retention.block_size * retention.block_size
    reach = retention.reach(length, num_found)
    assert num_found < reach <= length
    held = -(-reach // retention.block_size) - retention.num_passed(num_found)
    assert retention.window is not None
    assert held <= -(-(retention.window + retention.max_step_tokens) // retention.block_size) + 1


@given(any_retention, st.lists(st.booleans(), max_size=40))
def test_a_prefix_is_usable_if_what_its_next_token_sees_is_cached(retention: Retention, cached: list[bool]) -> None:
    def is_usable(num_blocks: int) -> bool:
        return all(cached[retention.num_passed(num_blocks * retention.block_size) : num_blocks]) and (
            num_blocks == 0 or cached[num_blocks - 1]
        )

    assert retention.longest_prefix(cached) == max(n for n in range(len(cached) + 1) if is_usable(n))


@given(any_retention, st.integers(1, 20), st.integers(1, 200))
def test_the_longest_sequence_is_one_that_the_pool_takes(retention: Retention, num_blocks: int, bound: int) -> None:
    longest = retention.longest(num_blocks, bound)
    assert longest <= bound and retention.least_blocks(longest) <= num_blocks
    assert longest == bound or retention.least_blocks(longest + 1) > num_blocks


def test_an_engine_keeps_what_its_limits_say() -> None:
    limits = EngineLimits(64, 16, 8, max_num_seqs=4, max_num_batched_tokens=32, kv_window=20)
    assert Retention.of(limits) == Retention(16, 20, 32)
