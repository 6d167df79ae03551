"""Pieces of memory are pinned once they have been written to, and all are let go in the end."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any, cast

import pytest

from deployments.engine.kv.pinned import PinnedMemory
from deployments.engine_tier import pinning
from deployments.engine_tier.pinning import Pinner
from deployments.errors import PinError
from deployments.kv_tier.mapped import mappings
from deployments.kv_tier.store import TierStore
from tests.waiting import wait_until

PIECE = 4 * mmap.PAGESIZE
NUM_PIECES = 5


class Driver:
    """Stands in for CUDA's: what is pinned now."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.refuses = False

    def register(self, address: int, num_bytes: int) -> None:
        if self.refuses:
            raise PinError("operation not permitted")
        assert address not in self.pinned
        self.pinned[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.pinned[address]


class Mapped:
    """A store whose objects lie in this memory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def memory(self) -> Sequence[range]:
        return mappings(self._path)


@pytest.fixture(autouse=True)
def _short_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_BEAT_S", 0.01)
    monkeypatch.setattr(pinning, "PIECE_BYTES", PIECE)


@contextmanager
def mapped_file() -> Iterator[tuple[mmap.mmap, Mapped, int]]:
    """Memory of some pieces and a half one; the store that has it; where it begins."""
    size = NUM_PIECES * PIECE + PIECE // 2
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="kvrelay-test-") as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as memory:
            store = Mapped(file.name)
            yield memory, store, store.memory()[0].start


def pinner(driver: Driver, store: Any, idle: Event | None = None) -> Pinner:
    if idle is None:
        (idle := Event()).set()
    return Pinner(PinnedMemory(driver.register, driver.unregister), cast(TierStore, store), idle)


def test_what_is_written_to_is_pinned_and_nothing_else() -> None:
    driver = Driver()
    with mapped_file() as (memory, store, start):
        memory[PIECE] = 1
        one = pinner(driver, store)
        wait_until(lambda: driver.pinned == {start + PIECE: PIECE}, 10)
        memory[NUM_PIECES * PIECE] = memory[3 * PIECE] = 1
        expected = {start + PIECE: PIECE, start + 3 * PIECE: PIECE, start + NUM_PIECES * PIECE: PIECE // 2}
        wait_until(lambda: driver.pinned == expected, 10)
        one.stop()
        assert driver.pinned == {}


def test_a_store_that_is_mapped_later_is_found() -> None:
    driver = Driver()
    one = pinner(driver, Mapped("/dev/shm/kvrelay-test-"))
    with mapped_file() as (memory, _, start):
        memory[0] = 1
        wait_until(lambda: driver.pinned == {start: PIECE}, 10)
        one.stop()


def test_nothing_is_pinned_while_something_is_fetched() -> None:
    driver, idle = Driver(), Event()
    with mapped_file() as (memory, store, start):
        memory[0] = memory[PIECE] = 1
        one = pinner(driver, store, idle)
        one._thread.join(0.3)  # thirty beats
        assert driver.pinned == {}
        idle.set()
        wait_until(lambda: driver.pinned == {start: PIECE, start + PIECE: PIECE}, 10)
        one.stop()


def test_a_driver_that_refuses_is_asked_no_more_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver()
    driver.refuses = True
    with mapped_file() as (memory, store, _):
        memory[0] = memory[PIECE] = 1
        one = pinner(driver, store)
        one._thread.join(10)
        assert not one._thread.is_alive()
        one.stop()
    (record,) = caplog.records
    assert "cannot be pinned: operation not permitted" in record.getMessage()
