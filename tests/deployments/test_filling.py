"""A hand-off's way into the pool, with a loop that takes commands when the test says so."""

import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deployments.engine.handoff.completions import Completions
from deployments.filling import Filling
from deployments.messages import ChunkReady

LAYERS = [(0, 1), (1, 3), (3, 4)]


class HeldLoop:
    """Between two steps of an engine, whenever `go_on` is called."""

    def __init__(self) -> None:
        self._commands: list[tuple[Callable[[Any], Any], Future[Any]]] = []

    def submit(self, command: Callable[[Any], Any]) -> "Future[Any]":
        self._commands.append((command, Future()))
        return self._commands[-1][1]

    def go_on(self) -> None:
        while self._commands:
            command, future = self._commands.pop(0)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command(None))
                except ValueError as error:
                    future.set_exception(error)


class Pool:
    """Notes what is imported: its layers and values."""

    def __init__(self) -> None:
        self.imported: list[tuple[tuple[int, int] | None, list[float]]] = []

    def import_chunk(self, chunk: ChunkReady, tensor: Tensor, engine: object) -> None:
        if chunk.num_blocks == 0:
            raise ValueError("no blocks")
        self.imported.append((chunk.layers, tensor.flatten().tolist()))


class Rig:
    def __init__(self) -> None:
        self.loop = HeldLoop()
        self.pool = Pool()
        self.released: list[int] = []
        loop = cast(Any, self.loop)
        self.filling = Filling(loop, self.pool.import_chunk, Completions(), self.released.append)

    def add(
        self, tensor: Tensor, layers: tuple[int, int] | None, num_blocks: int = 1, index: int = 0, keeps: bool = True
    ) -> None:
        chunk, num_parts = ChunkReady("r", index, 0, num_blocks, layers=layers), 1 if layers is None else len(LAYERS)
        self.filling.add(chunk, tensor, complete_s=0.0, num_parts=num_parts, keeps=keeps)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_whole_chunk_is_imported_between_two_steps(rig: Rig) -> None:
    rig.add(torch.arange(4.0), None)
    assert rig.pool.imported == []
    rig.loop.go_on()
    (arrived,) = rig.filling.finish()
    assert arrived.seconds > 0.0 and arrived.ago_s >= 0.0
    assert (arrived.num_blocks, arrived.num_bytes, rig.released) == (1, 16, [0])
    assert rig.pool.imported == [(None, [0.0, 1.0, 2.0, 3.0])]


def test_each_chunk_is_given_back_as_soon_as_all_of_it_is_in_the_pool(rig: Rig) -> None:
    for layers in LAYERS[:2]:
        rig.add(torch.zeros(layers[1] - layers[0]), layers, index=5)
    rig.add(torch.zeros(4), None, index=6)
    rig.loop.go_on()
    assert rig.released == [6]
    rig.add(torch.zeros(1), LAYERS[2], index=5)
    rig.loop.go_on()
    assert rig.released == [6, 5]
    assert [chunk.num_bytes for chunk in rig.filling.finish()] == [16, 16]


def test_parts_of_two_chunks_are_not_imported_as_one_though_they_lie_behind_each_other(rig: Rig) -> None:
    whole = torch.arange(8.0)
    rig.add(whole[:1], LAYERS[0], index=0)
    rig.add(whole[1:3], LAYERS[1], index=1)
    rig.loop.go_on()
    assert rig.pool.imported == [((0, 1), [0.0]), ((1, 3), [1.0, 2.0])]


def test_parts_that_lie_behind_each_other_and_come_within_a_step_are_imported_as_one(rig: Rig) -> None:
    whole = torch.arange(8.0).view(4, 2)
    for layers in LAYERS[:2]:
        rig.add(whole[slice(*layers)], layers)
    rig.loop.go_on()
    rig.add(whole[3:], LAYERS[2])
    rig.loop.go_on()
    rig.filling.finish()
    assert rig.pool.imported == [((0, 3), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), ((3, 4), [6.0, 7.0])]


def test_parts_with_memory_of_their_own_are_imported_one_by_one(rig: Rig) -> None:
    for first, end in LAYERS:
        rig.add(torch.full((end - first,), float(first)), (first, end))
    rig.loop.go_on()
    rig.filling.finish()
    assert rig.pool.imported == [((0, 1), [0.0]), ((1, 3), [1.0, 1.0]), ((3, 4), [3.0])]


def test_memory_of_parts_that_were_sent_is_given_back_before_the_next_ones_come(rig: Rig) -> None:
    """What has the room waits for what needs it, else."""
    tensors = [torch.zeros(1), torch.zeros(2)]
    refs = [weakref.ref(tensor) for tensor in tensors]
    for layers, keeps in zip(LAYERS[:2], (False, True), strict=True):
        rig.add(tensors.pop(0), layers, keeps=keeps)
    rig.loop.go_on()
    assert [ref() is None for ref in refs] == [True, False]
    rig.add(torch.zeros(1), LAYERS[2])
    rig.loop.go_on()
    assert refs[1]() is None, "all of the chunk is read"
    rig.filling.finish()


def test_when_a_transfer_fails_no_part_is_read_any_more(rig: Rig) -> None:
    """Its source may have given the memory to others."""
    whole = torch.arange(4.0)
    with pytest.raises(ConnectionError), rig.filling as filling:
        rig.add(whole[:1], LAYERS[0])
        rig.loop.go_on()
        rig.add(whole[1:3], LAYERS[1])
        raise ConnectionError
    rig.loop.go_on()
    assert rig.pool.imported == [((0, 1), [0.0])]
    with pytest.raises(CancelledError):
        filling.finish()


def test_what_the_engine_refuses_is_told(rig: Rig) -> None:
    rig.add(torch.zeros(1), None, num_blocks=0)
    rig.loop.go_on()
    with pytest.raises(ValueError, match="no blocks"):
        rig.add(torch.zeros(1), None, index=1)


def test_what_the_engine_refuses_last_is_told_in_the_end(rig: Rig) -> None:
    rig.add(torch.zeros(1), None)
    rig.add(torch.zeros(1), None, num_blocks=0, index=1)
    rig.loop.go_on()
    with pytest.raises(ValueError, match="no blocks"):
        rig.filling.finish()
