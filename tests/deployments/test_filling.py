"""A chunk's way into the pool, with a loop that takes commands when the test says so."""

import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deployments.engine_host import Filling
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
        self.filling = Filling(cast(Any, self.loop), self.pool.import_chunk)

    def add(self, tensor: Tensor, layers: tuple[int, int] | None, num_blocks: int = 1) -> None:
        self.filling.add(ChunkReady("r", 0, 0, num_blocks, layers=layers), tensor, complete_s=0.0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_whole_chunk_is_imported_between_two_steps(rig: Rig) -> None:
    rig.add(torch.arange(4.0), None)
    assert rig.pool.imported == []
    rig.loop.go_on()
    assert rig.filling.finish() > 0.0
    assert rig.pool.imported == [(None, [0.0, 1.0, 2.0, 3.0])]


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
    tensors = [torch.zeros(1), torch.zeros(1)]
    refs = [weakref.ref(tensor) for tensor in tensors]
    for layers, keeps in zip(LAYERS[::2], (False, True), strict=True):
        rig.filling.add(ChunkReady("r", 0, 0, 1, layers=layers), tensors.pop(0), complete_s=0.0, keeps=keeps)
    rig.loop.go_on()
    assert [ref() is None for ref in refs] == [True, False]
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
    rig.add(torch.zeros(1), LAYERS[0], num_blocks=0)
    rig.add(torch.zeros(1), LAYERS[2])
    rig.loop.go_on()
    with pytest.raises(ValueError, match="no blocks"):
        rig.filling.finish()
