"""The prefill engine's side of hand-offs: what it computes for others, and the chunks that wait to be taken.

A chunk is announced, and may be taken, as soon as its memory is set aside. Who takes it is told when it is complete.
"""

import itertools
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from deployments.engine.handoff import states
from deployments.engine.handoff.states import Clock, Side, State
from deployments.kv_groups import layers_of_parts
from deployments.messages import ChunkReady, DrawnToken

if TYPE_CHECKING:
    from torch import Tensor


Completion = Future[DrawnToken | None]


@dataclass(frozen=True, slots=True)
class TakenChunk:
    """A chunk that was given away, computed already or not.

    Attributes:
        tensor: its memory.
        completion: done when the KV is there, with the first token if the chunk is the last; cancelled if the hand-off
            is over before.
        cuts: layers at which it is cut into parts, each of which is complete by itself; none: it is whole.
        earlier: as `completion`, of the parts before the last.
    """

    tensor: "Tensor"
    completion: Completion
    cuts: tuple[int, ...] = ()
    earlier: tuple[Completion, ...] = ()

    def parts(self) -> "list[tuple[tuple[int, int] | None, Tensor, Completion]]":
        """Its parts in order: their layers, see `ChunkReady`, their memory, and when they are complete."""
        if not self.cuts:
            return [(None, self.tensor, self.completion)]
        layers = layers_of_parts(self.cuts, len(self.tensor))
        completions = (*self.earlier, self.completion)
        return [(part, self.tensor[slice(*part)], done) for part, done in zip(layers, completions, strict=True)]


@dataclass(slots=True)
class _Chunk:
    num_blocks: int
    tensor: "Tensor | None"
    is_last: bool
    cuts: tuple[int, ...] = ()
    earlier: tuple[Completion, ...] = ()
    # Of the earlier parts; who counts one takes its completion, and finishes it without the lock.
    num_copied: int = 0
    is_copied: bool = False
    # Who sets this takes the completion; it is finished without the lock, for others may do anything then.
    is_complete: bool = False
    completion: Completion = field(default_factory=Future)


class _Outgoing(Side):
    def __init__(self, expires_s: float, first_block: int) -> None:
        super().__init__(expires_s)
        self.next_block = first_block
        self.first_token: DrawnToken | None = None
        self.chunks: dict[int, _Chunk] = {}


class Outbox:
    """Safe to use from any thread; only the engine's own opens hand-offs and puts chunks in.

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
        """Whether the token behind the prompt was drawn; it was where the receiver has released every chunk already."""
        handoff = self._handoffs.get(request_id)
        return handoff is None or handoff.first_token is not None

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

    def put(
        self, request_id: str, num_blocks: int, tensor: "Tensor", *, is_last: bool, cuts: tuple[int, ...] = ()
    ) -> ChunkReady:
        """Announce the chunk that comes next, in parts of layers or whole; the last one brings the first token."""
        with self._lock:
            handoff = self._handoffs[request_id]
            assert handoff.state in (State.RESERVED, State.FILLING), f"{request_id} is {handoff.state}"
            start, index = handoff.next_block, next(self._chunk_numbers)
            handoff.chunks[index] = _Chunk(num_blocks, tensor, is_last, cuts, tuple(Future() for _ in cuts))
            handoff.next_block += num_blocks
            self._num_blocks += num_blocks
            handoff.move(State.READY if is_last else State.FILLING)
            self._advance(request_id, handoff)
            return ChunkReady(request_id, index, start, num_blocks, is_last)

    def note_copied(self, request_id: str, index: int) -> None:
        """A whole chunk is in its memory, or its next part. Unknown ones are no error: the hand-off may be over."""
        with self._lock:
            handoff = self._handoffs.get(request_id)
            chunk = None if handoff is None else handoff.chunks.get(index)
            if handoff is None or chunk is None:
                return
            part = None
            if chunk.num_copied < len(chunk.earlier):
                part = chunk.earlier[chunk.num_copied]
                chunk.num_copied += 1
            else:
                chunk.is_copied = True
            is_complete = _becomes_complete(chunk, handoff)
        if part is not None:
            part.set_result(None)
        elif is_complete:
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
        return None if tensor is None else TakenChunk(tensor, chunk.completion, chunk.cuts, chunk.earlier)

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
            parts = [part for chunk in incomplete for part in chunk.earlier[chunk.num_copied :]]
            for chunk in incomplete:
                chunk.is_complete, chunk.num_copied = True, len(chunk.earlier)
        for completion in (*parts, *(chunk.completion for chunk in incomplete)):
            completion.cancel()

    def renew(self, request_id: str) -> bool:
        """The other engine lives; False: there is no such hand-off any more."""
        with self._lock:
            return states.renew(self._handoffs.get(request_id), self._clock() + self._lease_s)

    def expired(self) -> list[str]:
        """Hand-offs whose lease has run out; the engine drops them."""
        with self._lock:
            return states.expired(self._handoffs, self._clock())

    def next_expiry_s(self) -> float | None:
        """Seconds until the next lease runs out; None: there is none."""
        with self._lock:
            return states.next_expiry_s(self._handoffs, self._clock())

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
