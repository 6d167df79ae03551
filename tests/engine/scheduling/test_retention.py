"""The arithmetic of windows in blocks, beside what it says counted token by token."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.retention import Retention

windowed = st.builds(Retention, st.integers(1, 9), st.tuples(st.integers(1, 30)), st.integers(1, 12))
one_group = st.one_of(windowed, st.builds(Retention, st.integers(1, 9)))
groups = st.builds(
    lambda num_full, num_windowed, window: (None,) * num_full + (window,) * num_windowed,
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(1, 30),
)
any_retention = st.one_of(one_group, st.builds(Retention, st.integers(1, 9), groups, st.integers(1, 12)))


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
    whole = retention.num_full * -(-num_tokens // retention.block_size)
    least = whole + retention.num_windowed * most
    assert least <= retention.least_blocks(num_tokens) <= least + retention.num_windowed * spare


@given(windowed, st.integers(1, 100), st.integers(0, 99))
def test_a_sequence_begins_with_what_it_holds_at_once_or_less(retention: Retention, length: int, found: int) -> None:
    num_found = min(found, length - 1) // retention.block_size * retention.block_size
    reach = retention.reach(length, num_found)
    assert num_found < reach <= length
    held = -(-reach // retention.block_size) - retention.num_passed(num_found)
    assert retention.window is not None
    assert held <= -(-(retention.window + retention.max_step_tokens) // retention.block_size) + 1


@given(windowed, st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_a_prefix_is_usable_if_what_its_next_token_sees_is_cached(
    retention: Retention, cached: list[tuple[bool, bool]]
) -> None:
    in_full, in_windowed = [block[0] for block in cached], [block[1] for block in cached]

    def is_usable(num_blocks: int) -> bool:
        within = in_windowed[retention.num_passed(num_blocks * retention.block_size) : num_blocks]
        return all(in_full[:num_blocks]) and all(within) and (num_blocks == 0 or in_windowed[num_blocks - 1])

    assert retention.longest_prefix(cached) == max(n for n in range(len(cached) + 1) if is_usable(n))


@given(any_retention, st.integers(1, 20), st.integers(1, 200))
def test_the_longest_sequence_is_one_that_the_pool_takes(retention: Retention, num_blocks: int, bound: int) -> None:
    longest = retention.longest(num_blocks, bound)
    assert longest <= bound and retention.least_blocks(longest) <= num_blocks
    assert longest == bound or retention.least_blocks(longest + 1) > num_blocks


def test_an_engine_keeps_what_its_limits_say() -> None:
    limits = EngineLimits(64, 16, 8, max_num_seqs=4, max_num_batched_tokens=32, kv_windows=(None, 20))
    assert Retention.of(limits) == Retention(16, (None, 20), 32)


@pytest.mark.parametrize("windows", [(), (20, None), (20, 30)])
def test_groups_that_keep_all_come_first_and_the_others_have_one_window(windows: tuple[int | None, ...]) -> None:
    with pytest.raises(AssertionError, match="out of order"):
        Retention(16, windows)
