"""What is asked for often is worth less in one place; what one session asks for keeps its worth. Memory is bounded."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments.routing.heat import Heat, worth


def chain(*blocks: int) -> list[bytes]:
    return [block.to_bytes(16, "big") for block in blocks]


def ask(heat: Heat, blocks: list[bytes], now_s: float) -> list[tuple[int, float]]:
    """As a request does: it looks, and is sent."""
    parts = heat.look(blocks, now_s)
    assert heat.look(blocks, now_s) == parts, "who looks and goes elsewhere has not asked"
    heat.ask(blocks, now_s)
    return parts


def test_the_first_ask_finds_nothing_and_each_counts() -> None:
    heat = Heat()
    assert ask(heat, chain(1, 2, 3, 4, 5), 0.0) == [(1, 0.0), (2, 0.0), (4, 0.0), (5, 0.0)]
    assert ask(heat, chain(1, 2, 9), 0.0) == [(1, 1.0), (2, 1.0), (3, 0.0)]
    assert ask(heat, chain(1, 2, 9), 60.0) == [(1, 1.0), (2, 1.0), (3, 0.5)], "after a minute an ask counts half"
    assert ask(heat, [], 60.0) == []


def test_what_was_asked_for_longest_ago_is_forgotten_first() -> None:
    heat = Heat(max_counts=2)
    for block in (1, 2, 1, 3):
        heat.ask(chain(block), 0.0)
    assert len(heat) == 2
    assert ask(heat, chain(1), 0.0) == [(1, 2.0)]
    assert ask(heat, chain(2), 0.0) == [(1, 0.0)]


def test_a_system_prompt_is_worth_little_and_the_session_behind_it_all() -> None:
    parts = [(1, 1000.0, 1), (2, 1000.0, 1), (4, 1.0, 1), (8, 0.0, 1)]
    assert worth(8, parts, hot_asks=2.0) == pytest.approx(6.0, abs=0.01)
    assert worth(2, parts, hot_asks=2.0) < 0.01
    copied = [(end, asks, 500) for end, asks, _ in parts]
    assert worth(8, copied, hot_asks=2.0) == 8.0, "there are enough of it"


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1e6), st.integers(0, 64)), min_size=1, max_size=8),
    st.floats(0.1, 100),
)
def test_more_blocks_are_never_worth_less_and_never_more_than_they_are(
    lengths: list[tuple[int, float, int]], hot_asks: float
) -> None:
    parts, end = [], 0
    for length, asks, copies in lengths:
        end += length
        parts.append((end, asks, copies))
    values = [worth(depth, parts, hot_asks) for depth in range(end + 1)]
    assert values == sorted(values)
    assert all(value <= depth for depth, value in enumerate(values))
