"""Memory that is pinned piece by piece: what lies in it, and where a transfer has to be cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.kv.pinned import PinnedMemory
from deployments.errors import PinError

BASE = 1 << 40


class Driver:
    """Stands in for CUDA's: what is pinned now."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def register(self, address: int, num_bytes: int) -> None:
        if num_bytes == 13:
            raise PinError("invalid argument")
        self.pinned[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.pinned[address]


def memory(driver: Driver) -> PinnedMemory:
    return PinnedMemory(driver.register, driver.unregister)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=8),
    st.integers(0, 60),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_parts_lie_in_one_piece_each_and_make_up_the_whole_or_there_are_none(
    pieces: list[tuple[int, int]], first: int, num_bytes: int, random: object
) -> None:
    """Pieces: a gap and a size each, pinned in any order."""
    starts, at = [], BASE
    for gap, size in pieces:
        starts.append((at + gap, size))
        at += gap + size
    pinned = memory(Driver())
    for start, size in sorted(starts, key=lambda piece: hash((piece, repr(random)))):
        pinned.pin(start, size)
    piece_of = {address: start for start, size in starts for address in range(start, start + size)}
    wanted = range(BASE + first, BASE + first + num_bytes)
    sizes = pinned.cut(wanted.start, num_bytes)
    if not all(address in piece_of for address in wanted):
        assert sizes is None
        return
    assert sizes is not None and sum(sizes) == num_bytes
    at = wanted.start
    for size in sizes:
        assert size > 0 and piece_of[at] == piece_of[at + size - 1]
        at += size
    assert len(sizes) == len({piece_of[address] for address in wanted}), "no more parts than pieces"


def test_all_is_let_go_and_what_was_refused_is_not_taken_for_pinned() -> None:
    driver = Driver()
    pinned = memory(driver)
    pinned.pin(BASE, 8)
    pinned.pin(BASE + 8, 4)
    with pytest.raises(PinError, match="invalid argument"):
        pinned.pin(BASE + 12, 13)
    assert pinned.cut(BASE + 4, 8) == [4, 4]
    assert pinned.cut(BASE + 4, 9) is None
    assert driver.pinned == {BASE: 8, BASE + 8: 4}
    pinned.unpin()
    assert driver.pinned == {}
    assert pinned.cut(BASE, 1) is None
