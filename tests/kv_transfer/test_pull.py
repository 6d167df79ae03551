"""One hand-off on its way here: real questions and answers over real lines, an outbox as the source."""

import socket
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deployments.engine.handoff.outbox import Outbox
from deployments.engine.handoff.outgoing import Part, Told
from deployments.errors import TransferError
from deployments.kv_groups import KVGroup
from deployments.kv_transfer.base import Arrival, TransferConfig
from deployments.kv_transfer.inquiries import Answers, Inquiries
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Job, LinkLostError
from deployments.kv_transfer.notes import Note, decode, encode
from deployments.kv_transfer.process import Counters
from deployments.kv_transfer.pull import Pull
from deployments.kv_transfer.receiver import RemoteHandoff
from deployments.messages import ChunkReady, DrawnToken
from tests.waiting import wait_until

LAYOUT = KVLayout("test-model", "float32", block_size=16, groups=(KVGroup((0, 1, 2), 1, 4),))
FIRST = DrawnToken(7, logprob=float("-inf"), rank=3, top=((7, -0.5), (9, float("-inf"))))
PATIENCE_S = 30.0


class FakeLink:
    """Of either end; what is received is there at once."""

    name = "test"

    def __init__(self, inquiries: Inquiries | None = None) -> None:
        self._inquiries = inquiries
        self.num_sent = 0
        self.is_closed = False

    def submit(self, job: Job) -> "Future[Tensor | None]":
        self.num_sent += 1
        done: Future[Tensor | None] = Future()
        done.set_result(cast(Any, job)() if self._inquiries is not None else None)
        return done

    def close(self, reason: str, kind: type[TransferError] = TransferError) -> None:
        self.is_closed = True
        if self._inquiries is not None:
            self._inquiries.end(kind, reason)


class World:
    """A source with one hand-off, and a receiver that opens as many links to it as it wants."""

    def __init__(self) -> None:
        self.outbox = Outbox(1000, lease_s=1e9)
        self.outbox.open("r", 0)
        handoff = self.outbox.take("r")
        assert handoff is not None
        self.handoff = handoff
        self.counters = Counters()
        self.tensors: list[Tensor] = []
        self.away: set[int] = set()
        self.lines: list[tuple[Line, Line]] = []
        self.open_links: dict[bool, Inquiries] = {}
        self.source_links: list[FakeLink] = []
        self.remote = RemoteHandoff("object", cast(Any, None), "source", LAYOUT, "cpu")

    def put(self, *, is_last: bool = False, cuts: tuple[int, ...] = ()) -> ChunkReady:
        tensor = torch.full(LAYOUT.chunk_shape(2), float(len(self.tensors)))
        self.tensors.append(tensor)
        return self.outbox.put("r", 2, tensor, is_last=is_last, cuts=cuts, num_cached_tokens=5)

    def complete(self, chunk: ChunkReady, num_parts: int = 1) -> None:
        for _ in range(num_parts):
            self.outbox.note_copied("r", chunk.index)
        if chunk.is_last:
            self.outbox.set_first_token("r", FIRST)

    def pull(self, is_read: bool = True) -> Pull:
        return Pull(cast(Any, self), self.remote, is_read, TransferConfig())

    def lose_links(self) -> None:
        """The source closes its ends."""
        for _, theirs in self.lines:
            theirs.close()

    # What `Pull` asks of a receiver.

    def inquiries_at(self, handoff: RemoteHandoff, config: TransferConfig, is_sent: bool) -> Inquiries:
        if (known := self.open_links.get(is_sent)) is not None and known._ended is None:
            return known
        ours, theirs = (Line(end) for end in socket.socketpair())
        self.lines.append((ours, theirs))
        inquiries = self.open_links[is_sent] = Inquiries()
        self.source_links.append(FakeLink())
        source_link: Any = self.source_links[-1]
        Thread(target=Answers(source_link, theirs, self).run, daemon=True).start()
        link: Any = FakeLink(inquiries)
        inquiries.begin(link, ours)
        return inquiries

    def view(self, handoff: RemoteHandoff, note: Note) -> Tensor | None:
        assert note.offset is not None
        return self.tensors[note.offset]

    def receive(self, handoff: RemoteHandoff, text: str) -> Tensor:
        note = decode(text)
        first, end = note.layers or (0, 3)
        return self.tensors[note.index][first:end].clone()

    # What `Answers` ask of a source.

    def watch(self, object_id: str, told: Told) -> bool:
        assert object_id == self.remote.object_id
        self.handoff.watch(told)
        return True

    def release(self, object_id: str, index: int) -> None:
        self.handoff.release(index)

    def describe(self, object_id: str, part: Part) -> tuple[str, bool] | None:
        index = part.chunk.index
        note = Note.of(part.chunk, part.num_parts, part.tensor.shape[2], None if index in self.away else index)
        return encode(note), note.offset is not None

    def sending_of(self, part: Part) -> Job:
        return cast(Job, partial(int))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for pair in world.lines:
        for line in pair:
            line.close()


def check(arrival: Arrival, chunk: ChunkReady, value: float, *, is_lent: bool) -> None:
    assert (arrival.chunk.index, arrival.chunk.start_block, arrival.chunk.num_blocks) == (
        chunk.index,
        chunk.start_block,
        2,
    )
    assert arrival.chunk.num_cached_tokens == 5 and arrival.is_lent is is_lent
    assert (arrival.tensor == value).all()


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "sent"])
def test_a_hand_off_comes_chunk_by_chunk_and_its_first_token_with_the_last(world: World, is_read: bool) -> None:
    arrivals = iter(world.pull(is_read))
    first = world.put()
    world.complete(first)
    check(next(arrivals), first, 0.0, is_lent=is_read)
    last = world.put(is_last=True)
    world.complete(last)
    arrival = next(arrivals)
    check(arrival, last, 1.0, is_lent=is_read)
    assert arrival.chunk.first_token == FIRST and arrival.chunk.is_last
    assert next(arrivals, None) is None
    stats = world.counters.read()
    assert (stats.num_received, stats.num_read_in_place, stats.num_failed) == (2, 2 if is_read else 0, 0)


def test_parts_are_views_of_one_chunk(world: World) -> None:
    arrivals = iter(world.pull())
    world.complete(world.put(is_last=True, cuts=(1,)), num_parts=2)
    parts = list(arrivals)
    assert [part.chunk.layers for part in parts] == [(0, 1), (1, 3)] and {part.num_parts for part in parts} == {2}
    assert [part.tensor.untyped_storage().data_ptr() for part in parts] == [world.tensors[0].data_ptr()] * 2
    assert [part.chunk.first_token for part in parts] == [None, FIRST]
    assert world.counters.read().num_received == 1


def test_chunks_that_lie_where_they_cannot_be_read_are_sent(world: World) -> None:
    world.away = {1, 2}
    arrivals = world.pull()
    for is_last in (False, False, False, True):
        world.complete(world.put(is_last=is_last))
    found = {arrival.chunk.index: arrival.is_lent for arrival in arrivals}
    assert found == {0: True, 1: False, 2: False, 3: True}


def test_chunks_are_given_back_at_their_source(world: World) -> None:
    pull = world.pull()
    world.complete(world.put())
    world.complete(world.put(is_last=True))
    for arrival in pull:
        pull.release(arrival.chunk.index)
    wait_until(lambda: len(world.outbox) == 0, PATIENCE_S)


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "sent"])
def test_a_lost_link_is_replaced_and_nothing_comes_twice(world: World, is_read: bool) -> None:
    pull = world.pull(is_read)
    arrivals = iter(pull)
    chunks = [world.put(is_last=is_last) for is_last in (False, False, True)]
    for i, chunk in enumerate(chunks):
        world.complete(chunk)
        check(next(arrivals), chunk, float(i), is_lent=is_read)
        world.lose_links()
        # What is said now may be lost; it is said again if the chunk is offered again.
        pull.release(chunk.index)
    assert next(arrivals, None) is None
    pull.release(chunks[-1].index)
    world.handoff.let_go()
    assert len(world.outbox) == 0 and world.counters.read().num_failed == 0


def test_a_link_that_is_lost_again_and_again_fails_the_hand_off(world: World) -> None:
    pull = world.pull()
    world.lose_links()
    wait_until(lambda: world.open_links[False]._ended is not None, PATIENCE_S)
    thread_found: list[BaseException] = []

    def run() -> None:
        try:
            list(pull)
        except TransferError as error:
            thread_found.append(error)

    thread = Thread(target=run)
    thread.start()
    wait_until(lambda: len(world.lines) == 2, PATIENCE_S)
    world.lose_links()
    thread.join(PATIENCE_S)
    assert "KV from engine source: the source closed the link" in str(thread_found[0])
    assert not isinstance(thread_found[0], LinkLostError) and world.counters.read().num_failed == 1


def test_the_end_of_a_hand_off_that_is_over_is_told(world: World) -> None:
    arrivals = iter(world.pull())
    chunk = world.put()
    world.complete(chunk)
    check(next(arrivals), chunk, 0.0, is_lent=True)
    world.outbox.drop("r")
    with pytest.raises(TransferError, match="no longer has it"):
        next(arrivals)


def test_what_comes_when_nobody_waits_any_more_is_not_kept(world: World) -> None:
    pull = world.pull(is_read=False)
    world.complete(world.put())
    arrivals = iter(pull)
    next(arrivals)
    pull.close()
    world.complete(world.put())
    wait_until(lambda: world.source_links[0].num_sent == 2, PATIENCE_S)
    world.outbox.drop("r")
    wait_until(lambda: not world.open_links[True].are_open, PATIENCE_S)
    assert pull._heard.empty()
