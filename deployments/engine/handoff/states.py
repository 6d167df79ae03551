"""The hand-off of one prompt's KV between two engines, as an explicit state machine with a lease on either side.

    reserved -> filling -> ready -> claimed -> released

| | `Outbox`: the prefill engine | `Inbox`: the decode engine |
|---|---|---|
| reserved | the prompt waits or is computed | blocks are set aside |
| filling | some chunks are announced | some blocks have come |
| ready | every chunk is announced | every block and the first token are here |
| claimed | every chunk was taken | the sequence has its blocks and decodes |
| released | nothing is held | nothing is held |

Every other way out (an abort, a lease that ran out, the other engine's death) leads to released, from any state, once.
A lease is renewed by what the other engine does and by whoever brings the two together; an engine that hears nothing of
its peer for that long frees what it holds by itself. Knows no Ray, no transport and no pool of blocks.

A chunk is announced, and may be taken, as soon as its memory is set aside. Who takes it is told when it is complete.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Lock
from typing import TYPE_CHECKING

from deployments.messages import ChunkReady, DrawnToken

if TYPE_CHECKING:
    from torch import Tensor

Clock = Callable[[], float]


class State(Enum):
    """Of a hand-off, on one side; see the module."""

    RESERVED = auto()
    FILLING = auto()
    READY = auto()
    CLAIMED = auto()
    RELEASED = auto()


_NEXT = {
    State.RESERVED: {State.FILLING, State.READY, State.RELEASED},
    State.FILLING: {State.READY, State.RELEASED},
    State.READY: {State.CLAIMED, State.RELEASED},
    State.CLAIMED: {State.RELEASED},
    State.RELEASED: set[State](),
}


class _Side:
    """One side of one hand-off."""

    def __init__(self, expires_s: float) -> None:
        self.state = State.RESERVED
        self.expires_s = expires_s

    def move(self, state: State) -> None:
        """Go on; staying is no error."""
        assert state is self.state or state in _NEXT[self.state], f"from {self.state} to {state}"
        self.state = state


Completion = Future[DrawnToken | None]


@dataclass(frozen=True, slots=True)
class TakenChunk:
    """A chunk that was given away, computed already or not.

    Attributes:
        tensor: its memory.
        completion: done when the KV is there, with the first token if the chunk is the last; cancelled if the hand-off
            is over before.
    """

    tensor: "Tensor"
    completion: Completion


@dataclass(slots=True)
class _Chunk:
    num_blocks: int
    tensor: "Tensor | None"
    is_last: bool
    is_copied: bool = False
    # Who sets this takes the completion; it is finished without the lock, for others may do anything then.
    is_complete: bool = False
    completion: Completion = field(default_factory=Future)


class _Outgoing(_Side):
    def __init__(self, expires_s: float, first_block: int) -> None:
        super().__init__(expires_s)
        self.next_block = first_block
        self.first_token: DrawnToken | None = None
        self.chunks: dict[int, _Chunk] = {}


class Outbox:
    """The prefill engine's side: what it computes for others, and the chunks that wait to be taken.

    Safe to use from any thread; only the engine's own opens hand-offs and puts chunks in.

    Args:
        max_blocks: of all chunks that were announced and not released; they count until then, also when taken, since
            their memory is in use.
        lease_s: a hand-off that nobody has renewed for so long is over.
        clock: monotonic seconds.
    """

    def __init__(self, max_blocks: int, lease_s: float, clock: Clock = time.monotonic) -> None:
        self.max_blocks = max_blocks
        self._lease_s = lease_s
        self._clock = clock
        self._lock = Lock()
        self._handoffs: dict[str, _Outgoing] = {}
        self._num_blocks = 0
        # Of all hand-offs, so that what is still said of a broken one names no chunk of the one that follows it.
        self._chunk_numbers = itertools.count()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._handoffs

    def __len__(self) -> int:
        return len(self._handoffs)

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.max_blocks - self._num_blocks

    def state(self, request_id: str) -> State:
        handoff = self._handoffs.get(request_id)
        return State.RELEASED if handoff is None else handoff.state

    def open(self, request_id: str, first_block: int) -> None:
        """Begin a hand-off whose chunks start at this block."""
        with self._lock:
            assert request_id not in self._handoffs, f"{request_id} is handed over already"
            self._handoffs[request_id] = _Outgoing(self._clock() + self._lease_s, first_block)

    def next_block(self, request_id: str) -> int:
        """The first block that is not announced, or was not wanted."""
        return self._handoffs[request_id].next_block

    def has_first_token(self, request_id: str) -> bool:
        """Whether the token behind the prompt was drawn."""
        return self._handoffs[request_id].first_token is not None

    def set_first_token(self, request_id: str, token: DrawnToken) -> bool:
        """Keep what was drawn behind the prompt; False: it was drawn before a preemption, and is out already."""
        with self._lock:
            handoff = self._handoffs[request_id]
            if handoff.first_token is not None:
                return False
            handoff.first_token = token
            complete = [chunk for chunk in handoff.chunks.values() if _becomes_complete(chunk, handoff)]
        for chunk in complete:
            chunk.completion.set_result(token)
        return True

    def put(self, request_id: str, num_blocks: int, tensor: "Tensor", *, is_last: bool) -> ChunkReady:
        """Announce the chunk that comes next; the last one brings the first token."""
        with self._lock:
            handoff = self._handoffs[request_id]
            assert handoff.state in (State.RESERVED, State.FILLING), f"{request_id} is {handoff.state}"
            start, index = handoff.next_block, next(self._chunk_numbers)
            handoff.chunks[index] = _Chunk(num_blocks, tensor, is_last)
            handoff.next_block += num_blocks
            self._num_blocks += num_blocks
            handoff.move(State.READY if is_last else State.FILLING)
            self._advance(request_id, handoff)
            return ChunkReady(request_id, index, start, num_blocks, is_last)

    def note_copied(self, request_id: str, index: int) -> None:
        """All KV of a chunk is in its memory. Unknown ones are no error: the hand-off may be over."""
        with self._lock:
            handoff = self._handoffs.get(request_id)
            chunk = None if handoff is None else handoff.chunks.get(index)
            if handoff is None or chunk is None:
                return
            chunk.is_copied = True
            is_complete = _becomes_complete(chunk, handoff)
        if is_complete:
            chunk.completion.set_result(handoff.first_token if chunk.is_last else None)

    def take(self, request_id: str, index: int) -> TakenChunk | None:
        """Give a chunk away, once; None if it was taken, released, or never there."""
        with self._lock:
            handoff = self._handoffs.get(request_id)
            chunk = None if handoff is None else handoff.chunks.get(index)
            if handoff is None or chunk is None:
                return None
            tensor, chunk.tensor = chunk.tensor, None
            handoff.expires_s = self._clock() + self._lease_s
            self._advance(request_id, handoff)
        return None if tensor is None else TakenChunk(tensor, chunk.completion)

    def release(self, request_id: str, index: int) -> None:
        """The receiver has the chunk: its memory may be used for others.

        Unknown ones are no error. One that is not complete cannot be anywhere: that is said of it in vain.
        """
        with self._lock:
            handoff = self._handoffs.get(request_id)
            chunk = None if handoff is None else handoff.chunks.get(index)
            if handoff is None or chunk is None or not chunk.is_complete:
                return
            del handoff.chunks[index]
            self._num_blocks -= chunk.num_blocks
            handoff.expires_s = self._clock() + self._lease_s
            self._advance(request_id, handoff)

    def drop(self, request_id: str) -> None:
        """Whatever state it is in, it is over. Unknown ids are no error."""
        with self._lock:
            handoff = self._handoffs.pop(request_id, None)
            if handoff is None:
                return
            self._num_blocks -= sum(chunk.num_blocks for chunk in handoff.chunks.values())
            handoff.move(State.RELEASED)
            incomplete = [chunk for chunk in handoff.chunks.values() if not chunk.is_complete]
            for chunk in incomplete:
                chunk.is_complete = True
        for chunk in incomplete:
            chunk.completion.cancel()

    def renew(self, request_id: str) -> bool:
        """The other engine lives; False: there is no such hand-off any more."""
        with self._lock:
            return _renew(self._handoffs.get(request_id), self._clock() + self._lease_s)

    def expired(self) -> list[str]:
        """Hand-offs whose lease has run out; the engine drops them."""
        with self._lock:
            return _expired(self._handoffs, self._clock())

    def next_expiry_s(self) -> float | None:
        """Seconds until the next lease runs out; None: there is none."""
        with self._lock:
            return _next_expiry(self._handoffs, self._clock())

    def check_integrity(self) -> None:
        """Assert that no chunk is lost or counted twice."""
        with self._lock:
            held = sum(chunk.num_blocks for handoff in self._handoffs.values() for chunk in handoff.chunks.values())
            assert held == self._num_blocks, f"{self._num_blocks} blocks are counted, chunks have {held}"
            for request_id, handoff in self._handoffs.items():
                is_whole = handoff.state in (State.READY, State.CLAIMED)
                assert handoff.chunks or not is_whole, f"{request_id} is {handoff.state} and holds nothing"

    def _advance(self, request_id: str, handoff: _Outgoing) -> None:
        """Once all is out: taken means claimed, and the last release is the end. Under the lock."""
        if handoff.state is State.READY and all(chunk.tensor is None for chunk in handoff.chunks.values()):
            handoff.move(State.CLAIMED)
        if handoff.state is State.CLAIMED and not handoff.chunks:
            handoff.move(State.RELEASED)
            del self._handoffs[request_id]


def _becomes_complete(chunk: _Chunk, handoff: _Outgoing) -> bool:
    """Whether it is now, and was not before. Under the lock."""
    was_complete = chunk.is_complete
    chunk.is_complete = chunk.is_copied and (not chunk.is_last or handoff.first_token is not None)
    return chunk.is_complete and not was_complete


class _Incoming(_Side):
    def __init__(self, expires_s: float, blocks: range) -> None:
        super().__init__(expires_s)
        self.blocks = blocks
        self.missing = set(blocks)
        self.first_token: DrawnToken | None = None


class Inbox:
    """The decode engine's side: sequences whose blocks are set aside. For the engine's thread.

    Args:
        lease_s: a hand-off of which nobody has been heard for so long is over.
        clock: monotonic seconds.
    """

    def __init__(self, lease_s: float, clock: Clock = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._handoffs: dict[str, _Incoming] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._handoffs

    def __len__(self) -> int:
        return len(self._handoffs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handoffs)

    def state(self, request_id: str) -> State:
        handoff = self._handoffs.get(request_id)
        return State.RELEASED if handoff is None else handoff.state

    def reserve(self, request_id: str, blocks: range) -> None:
        """Begin a hand-off that brings these blocks, counted from the start of the sequence, and the first token."""
        assert request_id not in self._handoffs, f"{request_id} is reserved already"
        self._handoffs[request_id] = _Incoming(self._clock() + self._lease_s, blocks)

    def expect(self, chunk: ChunkReady) -> range | None:
        """Which blocks a chunk is for; None: nobody waits for it any more.

        One that has come before is no error: a second prefill engine computes the same KV, and nobody reads it yet.

        Raises:
            ValueError: not all of its blocks are set aside.
        """
        handoff = self._handoffs.get(chunk.request_id)
        if handoff is None:
            return None
        blocks = range(chunk.start_block, chunk.start_block + chunk.num_blocks)
        if not blocks or blocks[0] not in handoff.blocks or blocks[-1] not in handoff.blocks:
            raise ValueError(f"{chunk.request_id}: chunk {chunk.index} has {blocks}, {handoff.blocks} are awaited")
        return blocks

    def fill(self, chunk: ChunkReady) -> State:
        """The blocks of a chunk that `expect` accepted are here."""
        handoff = self._handoffs[chunk.request_id]
        handoff.missing.difference_update(range(chunk.start_block, chunk.start_block + chunk.num_blocks))
        if chunk.first_token is not None:
            handoff.first_token = chunk.first_token
        handoff.expires_s = self._clock() + self._lease_s
        is_whole = not handoff.missing and handoff.first_token is not None
        handoff.move(State.READY if is_whole else State.FILLING)
        return handoff.state

    def claim(self, request_id: str) -> DrawnToken:
        """The sequence takes a whole hand-off's blocks over, which ends it; returns the first token."""
        handoff = self._handoffs.pop(request_id)
        handoff.move(State.CLAIMED)
        handoff.move(State.RELEASED)
        assert handoff.first_token is not None
        return handoff.first_token

    def drop(self, request_id: str) -> int | None:
        """Whatever state it is in, it is over; the first block that had not come. None: there is no such hand-off."""
        handoff = self._handoffs.pop(request_id, None)
        if handoff is None:
            return None
        handoff.move(State.RELEASED)
        return min(handoff.missing, default=handoff.blocks.stop)

    def renew(self, request_id: str) -> bool:
        """The other engine lives; False: there is no such hand-off any more."""
        return _renew(self._handoffs.get(request_id), self._clock() + self._lease_s)

    def expired(self) -> list[str]:
        """Hand-offs whose lease has run out; the engine drops them."""
        return _expired(self._handoffs, self._clock())

    def next_expiry_s(self) -> float | None:
        """Seconds until the next lease runs out; None: there is none."""
        return _next_expiry(self._handoffs, self._clock())


def _renew(side: _Side | None, expires_s: float) -> bool:
    if side is None:
        return False
    side.expires_s = expires_s
    return True


def _expired(sides: Mapping[str, _Side], now_s: float) -> list[str]:
    return [request_id for request_id, side in sides.items() if side.expires_s <= now_s]


def _next_expiry(sides: Mapping[str, _Side], now_s: float) -> float | None:
    return min((max(0.0, side.expires_s - now_s) for side in sides.values()), default=None)
