"""Memory that processes of one machine share: given out and freed, read by another process, and what can go wrong."""

import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deployments.kv_transfer.local import Arena, Neighbours, Place
from deployments.kv_transfer.shared_memory import HostAddress, HostMemory
from tests.kv_transfer.threads import kv_threads
from tests.waiting import wait_until

PAGE = 4096


def own(arena: Arena, nbytes: int) -> Tensor:
    tensor = arena.allocate((nbytes,), torch.uint8)
    assert tensor is not None
    return tensor


def place_of(arena: Arena, tensor: Tensor) -> Place:
    place = arena.place_of(tensor)
    assert place is not None
    return place


def test_room_is_free_again_when_the_last_view_is_gone():
    arena = Arena(3 * PAGE, "cpu")
    first, second, third = (own(arena, PAGE) for _ in range(3))
    assert arena.allocate((1,), torch.uint8) is None
    view = second.view(torch.float32)[5:]
    second_at = place_of(arena, second).offset
    del second
    assert arena.allocate((1,), torch.uint8) is None
    del view
    again = own(arena, PAGE)
    assert place_of(arena, again).offset == second_at
    assert [place_of(arena, t).offset for t in (first, third)] == [0, 2 * PAGE]


def test_what_is_too_long_for_any_gap_has_no_room():
    arena = Arena(4 * PAGE, "cpu")
    kept = [own(arena, PAGE) for _ in range(4)]
    del kept[2], kept[0]
    assert arena.allocate((2 * PAGE,), torch.uint8) is None
    del kept[0]
    assert place_of(arena, own(arena, 2 * PAGE)).offset == 0


def test_tensors_that_live_at_once_never_overlap():
    rng = random.Random(0)
    arena = Arena(64 * PAGE, "cpu")
    alive: list[tuple[Tensor, int]] = []
    for i in range(2000):
        tensor = arena.allocate((rng.randrange(1, 8 * PAGE),), torch.uint8)
        if tensor is None:
            assert alive
        else:
            alive.append((tensor.fill_(i % 251), i % 251))
        rng.shuffle(alive)
        while alive and (tensor is None or rng.random() < 0.4):
            freed, value = alive.pop()
            assert (freed == value).all()
            tensor = freed
    assert all((tensor == value).all() for tensor, value in alive)


def test_memory_of_others_has_no_place_in_an_arena():
    arena = Arena(PAGE, "cpu")
    assert arena.place_of(torch.zeros(1)) is None
    own(arena, 1)
    assert arena.place_of(torch.zeros(1)) is None


def test_a_tensor_has_its_shape_and_dtype_and_can_be_written():
    tensor = Arena(1 << 20, "cpu").allocate((2, 3, 5), torch.bfloat16)
    assert tensor is not None
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2, 3, 5), torch.bfloat16, True)
    torch.add(torch.ones(2, 3, 5, dtype=torch.bfloat16), 1, out=tensor)
    assert tensor.sum() == 60


def read(neighbours: Neighbours, place: Place) -> float:
    """The first value there."""
    tensor = neighbours.view(place, (1,), torch.float32)
    assert tensor is not None
    return tensor.item()


def serve(pipe: Connection) -> None:
    """Another process: makes tensors of its own, and changes them when told."""
    torch.set_num_threads(1)
    arena = Arena(64 * PAGE, "cpu")
    own(arena, 3 * PAGE)
    tensor = own(arena, 4000).view(torch.float32).fill_(7.0)
    pipe.send(place_of(arena, tensor))
    while True:
        tensor.fill_(pipe.recv())
        pipe.send(None)


@pytest.fixture
def neighbour() -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection, Place]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    yield process, ours, ours.recv()
    process.kill()
    process.join()


def num_mapped() -> int:
    """Shared memory that is mapped in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:kvrelay")


def test_another_process_is_read_where_it_is_until_it_ends(neighbour):
    process, pipe, place = neighbour
    neighbours = Neighbours()
    tensor = neighbours.view(place, (10, 100), torch.float32)
    assert tensor is not None
    assert tensor.shape == (10, 100)
    assert (tensor == 7).all()
    pipe.send(8.0)
    pipe.recv()
    assert (tensor == 8).all()  # no copy
    assert read(neighbours, place) == 8
    assert len(neighbours) == 1
    process.kill()
    process.join()
    wait_until(lambda: len(neighbours) == 0)
    assert (tensor == 8).all()  # views keep it
    assert neighbours.view(place, (10, 100), torch.float32) is None
    wait_until(lambda: not kv_threads("neighbour"))
    before = num_mapped()
    del tensor
    assert num_mapped() == before - 1


def test_memory_that_cannot_be_mapped_is_not_viewed_and_tried_once(neighbour, caplog):
    _, _, place = neighbour
    assert isinstance(place.address, HostAddress)
    neighbours = Neighbours()
    assert neighbours.view(replace(place, machine="another"), (1,), torch.float32) is None
    stranger = replace(place, address=replace(place.address, token=b"x" * 16))
    missing = replace(place, address=replace(place.address, fd=12345))
    for _ in range(3):
        assert neighbours.view(stranger, (1,), torch.float32) is None
        assert neighbours.view(missing, (1,), torch.float32) is None
    assert sum("cannot be mapped" in message for message in caplog.messages) == 2
    assert len(neighbours) == 0
    assert read(neighbours, place) == 7


def test_an_arena_without_memory_has_no_room_and_says_so_once(monkeypatch, caplog):
    def refuse(nbytes: int) -> HostMemory:
        raise OSError("out of memory")

    monkeypatch.setattr(HostMemory, "create", refuse)
    arena = Arena(PAGE, "cpu")
    assert [arena.allocate((1,), torch.uint8) for _ in range(3)] == [None] * 3
    assert len(caplog.messages) == 1


def test_without_the_kernel_s_help_kv_is_sent(neighbour, monkeypatch, caplog):
    def refuse(pid: int) -> int:
        raise PermissionError("pidfd_open is not allowed here")

    _, _, place = neighbour
    neighbours = Neighbours()
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert [neighbours.view(place, (1,), torch.float32) for _ in range(2)] == [None, None]
    assert len(caplog.messages) == 1


def test_a_place_says_where_memory_begins_that_was_not_taken_before():
    arena = Arena(2 * PAGE, "cpu")
    place = arena.place
    assert place is not None and Neighbours().reaches(place)
    tensor = own(arena, 16)
    assert place.at(place_of(arena, tensor).offset) == place_of(arena, tensor)
    assert not Neighbours().reaches(replace(place, machine="another"))
