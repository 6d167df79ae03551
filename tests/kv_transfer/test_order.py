"""What several engines send each other at once, over groups that pair messages by their order alone, as NCCL does.

Real links, lines and questions; the groups are queues of this process. Each chunk has a value of its own, so that one
that is taken for another is seen.
"""

import random
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from time import sleep

import pytest
import torch
from torch import Tensor

from deployments.engine.handoff.outbox import Outbox, TakenHandoff
from deployments.engine.handoff.outgoing import Part, Told
from deployments.errors import TransferError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.channel import Channel
from deployments.kv_transfer.group import Group, Wait
from deployments.kv_transfer.inquiries import Announced, Answer, Answers, Heard, Inquiries, Want
from deployments.kv_transfer.line import Line
from deployments.kv_transfer.link import Job, Link, Steps, until_over
from deployments.messages import ChunkReady, DrawnToken
from tests.kv_transfer.peers import FakePeer

PATIENCE_S = 60.0
CONFIG = TransferConfig()
DEPTH = 4
# Chunks that a receiver has memory for; fewer than what its links could have under way.
ROOM = 3


class Wire:
    """From one end to the other; the n-th receive gets the n-th message, whatever it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[tuple[Tensor, threading.Event]] = deque()
        self._receives: deque[tuple[Tensor, threading.Event]] = deque()

    def send(self, tensor: Tensor) -> threading.Event:
        return self._add(self._messages, tensor)

    def receive(self, tensor: Tensor) -> threading.Event:
        return self._add(self._receives, tensor)

    def _add(self, queue: "deque[tuple[Tensor, threading.Event]]", tensor: Tensor) -> threading.Event:
        is_over = threading.Event()
        with self._lock:
            queue.append((tensor, is_over))
            while self._messages and self._receives:
                (sent, is_sent), (received, is_received) = self._messages.popleft(), self._receives.popleft()
                received.copy_(sent)
                is_sent.set()
                is_received.set()
        return is_over


class WireGroup:
    """One end of a wire. Like NCCL's it has several messages under way, and a wait for one looks again and again."""

    depth = DEPTH

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def start_send(self, tensor: Tensor) -> Wait:
        return partial(self._wait, self._wire.send(tensor))

    def start_recv(self, tensor: Tensor) -> Wait:
        return partial(self._wait, self._wire.receive(tensor))

    def abort(self) -> None:
        pass

    def _wait(self, is_over: threading.Event, timeout_s: float) -> bool:
        if timeout_s <= 0:
            raise TimeoutError("no other end")
        return is_over.wait(1e-4)


class Held:
    """The hand-offs of one source, of one chunk each, by name."""

    def __init__(self) -> None:
        self._outbox = Outbox(10**9, lease_s=1e9)
        self._handoffs: dict[str, TakenHandoff] = {}
        self._chunks: dict[str, ChunkReady] = {}

    def add(self, name: str, value: float) -> None:
        self._outbox.open(name, 0)
        handoff = self._outbox.take(name)
        assert handoff is not None
        self._handoffs[name] = handoff
        self._chunks[name] = self._outbox.put(name, 1, torch.tensor([value]), is_last=True)

    def finish(self, name: str) -> None:
        self._outbox.note_copied(name, self._chunks[name].index)
        self._outbox.set_first_token(name, DrawnToken(0))

    def drop(self, name: str) -> None:
        self._outbox.drop(name)

    def watch(self, object_id: str, told: Told) -> bool:
        self._handoffs[object_id].watch(told)
        return True

    def release(self, object_id: str, index: int) -> None:
        self._handoffs[object_id].release(index)

    def describe(self, object_id: str, part: Part) -> tuple[str, bool] | None:
        return f"note of {object_id}", False

    def sending_of(self, part: Part) -> Job:
        return partial(_send, part.kv)


def _send(tensor: Tensor, group: Group, config: TransferConfig) -> Steps:
    wait = group.start_send(tensor)
    yield True
    yield from until_over(wait, PATIENCE_S)
    return None


class Pair:
    """The links of a source and a receiver, one end each."""

    def __init__(self, held: Held, room: threading.Semaphore) -> None:
        wire, lines = Wire(), [Line(end) for end in socket.socketpair()]
        self._room = room
        self.inquiries = Inquiries()
        ours, theirs = (partial(Channel, WireGroup(wire), line) for line in lines)
        self.source = Link("source", FakePeer(), theirs, CONFIG, lambda _: None)
        threading.Thread(target=Answers(self.source, lines[1], held).run, daemon=True).start()
        self.receiver = Link("receiver", FakePeer(), ours, CONFIG, lambda _: None, self.inquiries)

    def ask(self, name: str) -> "SimpleQueue[Heard]":
        heard: SimpleQueue[Heard] = SimpleQueue()
        self.inquiries.ask(Want.SEND, name, heard.put, lambda note: self._receive)
        return heard

    def _receive(self, group: Group, config: TransferConfig) -> Steps:
        while not self._room.acquire(timeout=0.001):
            yield False
        tensor = group.allocate((1,), torch.float32)
        wait = group.start_recv(tensor)
        yield True
        yield from until_over(wait, PATIENCE_S)
        return tensor

    def close(self) -> None:
        self.receiver.close("end of the test")
        self.source.close("end of the test")


class Mesh:
    """Every source with every receiver."""

    def __init__(self, num_sources: int, num_receivers: int) -> None:
        self.sources = [Held() for _ in range(num_sources)]
        self._rooms = [threading.Semaphore(ROOM) for _ in range(num_receivers)]
        self.pairs = {
            (s, r): Pair(held, room) for s, held in enumerate(self.sources) for r, room in enumerate(self._rooms)
        }

    def pull(self, source: int, receiver: int, name: str) -> float:
        """What an engine does with a chunk: it waits for it, copies it, and gives its memory back."""
        heard = self.pairs[source, receiver].ask(name)
        announced = heard.get(timeout=PATIENCE_S)
        if announced is Answer.GONE:
            raise TransferError("the source no longer has it")
        assert isinstance(announced, Announced) and announced.arriving is not None, announced
        tensor = announced.arriving.result(PATIENCE_S)
        assert tensor is not None and announced.note == f"note of {name}"
        assert heard.get(timeout=PATIENCE_S) is Answer.WHOLE
        value = float(tensor)
        sleep(0.0005)
        self._rooms[receiver].release()
        return value

    def close(self) -> None:
        for pair in self.pairs.values():
            pair.close()


@pytest.fixture(params=[(2, 2), (3, 1)], ids=["2 by 2", "3 by 1"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    mesh = Mesh(*request.param)
    yield mesh
    mesh.close()


@pytest.mark.parametrize("seed", range(5))
def test_chunks_of_several_prompts_are_never_taken_for_each_other(mesh, seed):
    """Pulled before they are there, completed by several threads in any order, and some of them dropped."""
    rng = random.Random(seed)
    chunks = []
    for number in range(60):
        source, receiver = rng.choice(list(mesh.pairs))
        name = f"prompt-{number // 4}-chunk-{number}"
        mesh.sources[source].add(name, float(number))
        chunks.append((source, receiver, name))
    is_dropped = [rng.random() < 0.2 for _ in chunks]
    with ThreadPoolExecutor(len(chunks)) as engines, ThreadPoolExecutor(4) as completing:
        pulls = [engines.submit(mesh.pull, *chunk) for chunk in chunks]
        order = rng.sample(range(len(chunks)), len(chunks))
        for i in order:
            source, _, name = chunks[i]
            if is_dropped[i]:
                completing.submit(mesh.sources[source].drop, name)
            else:
                completing.submit(mesh.sources[source].finish, name)
        for i, pull in enumerate(pulls):
            if is_dropped[i]:
                with pytest.raises(TransferError, match="no longer has it"):
                    pull.result(PATIENCE_S)
            else:
                assert pull.result(PATIENCE_S) == float(i)
    assert not any(pair.receiver.is_closed or pair.source.is_closed for pair in mesh.pairs.values())


def test_what_is_sent_out_of_turn_ends_the_link():
    ours, theirs = (Line(end) for end in socket.socketpair())
    inquiries = Inquiries()
    link = Link("receiver", FakePeer(), partial(Channel, WireGroup(Wire()), ours), CONFIG, lambda _: None, inquiries)
    heard: list[SimpleQueue[Heard]] = [SimpleQueue() for _ in "ab"]
    for name, queue in zip("ab", heard, strict=True):
        inquiries.ask(Want.SEND, name, queue.put, lambda note: partial(_send, torch.zeros(1)))
    assert [theirs.hear(PATIENCE_S) for _ in "ab"] == ["0 send a", "1 send b"]
    theirs.say("1 sent 1 note")
    for queue in heard:
        error = queue.get(timeout=PATIENCE_S)
        assert isinstance(error, TransferError) and "message 1 out of turn" in str(error)
    assert link.is_closed
    theirs.close()
