"""The prefill engine's side of hand-offs: what it computes for others, and the chunks that wait for their receivers.

A hand-off is given away once, as a whole, when its prompt is accepted. Whoever has taken it is told of each chunk, or
part of one, as soon as it is complete, and gives chunks back one by one.
"""

import itertools
import time
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

from deployments.engine.handoff import states
from deployments.engine.handoff.outgoing import Chunk, Outgoing, Told, Watcher, tell_all
from deployments.engine.handoff.states import Clock, State
from deployments.messages import ChunkReady, DrawnToken

if TYPE_CHECKING:
    from torch import Tensor


class TakenHandoff:
    """A hand-off that was given away, computed already or not. Safe to use from any thread.

    What it has told of stays in memory until it is released, or this is let go; the hand-off may be over before.
    """

    def __init__(self, outbox: "Outbox", handoff: Outgoing) -> None:
        self._outbox = outbox
        self._handoff = handoff

    def watch(self, told: Told) -> None:
        """Be told of all parts that are complete and not released, and of those to come; the end comes last."""
        self._outbox.watch(self._handoff, told)

    def release(self, index: int) -> None:
        """The receiver has a chunk: its memory may be used for others.

        Unknown ones are no error. One that is not complete cannot be anywhere: that is said of it in vain.
        """
        self._outbox.release(self._handoff, [index])

    def let_go(self) -> None:
        """Nobody receives it any more: all that is complete is released."""
        self._outbox.release(self._handoff, None)


class Outbox:
    """Safe to use from any thread; only the engine's own opens hand-offs and puts chunks in.

    Args:
        max_blocks: of all chunks that were announced and not released; they count until then, also when they were told
            of, since their memory is in use.
        lease_s: a hand-off that nobody has renewed for so long is over.
        clock: monotonic seconds.
    """

    def __init__(self, max_blocks: int, lease_s: float, clock: Clock = time.monotonic) -> None:
        self.max_blocks = max_blocks
        self._lease_s = lease_s
        self._clock = clock
        self._lock = Lock()
        self._handoffs: dict[str, Outgoing] = {}
        self._num_blocks = 0
        self._on_release: Callable[[], object] = _nothing
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
            self._handoffs[request_id] = Outgoing(request_id, self._clock() + self._lease_s, first_block)

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
            words = [word for chunk in handoff.chunks.values() for word in chunk.complete(token)]
            watchers = handoff.note(words)
        tell_all(watchers)
        return True

    def put(
        self,
        request_id: str,
        num_blocks: int,
        tensor: "Tensor",
        *,
        is_last: bool,
        cuts: tuple[int, ...] = (),
        num_cached_tokens: int = 0,
    ) -> ChunkReady:
        """Announce the chunk that comes next, in parts of layers or whole; the last one brings the first token."""
        with self._lock:
            handoff = self._handoffs[request_id]
            assert handoff.state in (State.RESERVED, State.FILLING), f"{request_id} is {handoff.state}"
            start, index = handoff.next_block, next(self._chunk_numbers)
            ready = ChunkReady(request_id, index, start, num_blocks, is_last, num_cached_tokens=num_cached_tokens)
            handoff.chunks[index] = Chunk(ready, tensor, cuts)
            handoff.next_block += num_blocks
            self._num_blocks += num_blocks
            handoff.move(State.READY if is_last else State.FILLING)
            self._advance(handoff)
            return ready

    def note_copied(self, request_id: str, index: int) -> None:
        """A whole chunk is in its memory, or its next part. Unknown ones are no error: the hand-off may be over."""
        with self._lock:
            handoff = self._handoffs.get(request_id)
            chunk = None if handoff is None else handoff.chunks.get(index)
            if handoff is None or chunk is None:
                return
            chunk.num_copied = min(chunk.num_copied + 1, chunk.num_parts)
            words = chunk.complete(handoff.first_token)
            watchers = handoff.note(words) if words else []
        tell_all(watchers)

    def when_released(self, call: Callable[[], object]) -> None:
        """Have this called, from any thread, when there is room again."""
        self._on_release = call

    def take(self, request_id: str) -> TakenHandoff | None:
        """Give a hand-off away, once; None if it was taken, is over, or was never there."""
        with self._lock:
            handoff = self._handoffs.get(request_id)
            if handoff is None or handoff.is_taken:
                return None
            handoff.is_taken = True
            handoff.expires_s = self._clock() + self._lease_s
            self._advance(handoff)
            return TakenHandoff(self, handoff)

    def watch(self, handoff: Outgoing, told: Told) -> None:
        """See `TakenHandoff.watch`."""
        watcher = Watcher(told)
        with self._lock:
            chunks = [] if handoff.is_dropped else list(handoff.chunks.values())
            words = [word for chunk in chunks for word in chunk.parts(handoff.first_token)]
            if (end := handoff.end) is None:
                handoff.watchers.append(watcher)
            else:
                words.append(end)
            watcher.add(words)
        watcher.tell()

    def release(self, handoff: Outgoing, indices: list[int] | None) -> None:
        """See `TakenHandoff.release` and `let_go`; None: all that are complete."""
        with self._lock:
            chunks = handoff.chunks
            known = [index for index in (list(chunks) if indices is None else indices) if index in chunks]
            if handoff.is_dropped:  # they count no more, and are there for those who still read them
                for index in known:
                    del chunks[index]
                return
            released = [chunks.pop(index) for index in known if chunks[index].is_complete]
            if not released:
                return
            self._num_blocks -= sum(chunk.ready.num_blocks for chunk in released)
            handoff.expires_s = self._clock() + self._lease_s
            self._advance(handoff)
        self._on_release()

    def drop(self, request_id: str) -> None:
        """Whatever state it is in, it is over. Unknown ids are no error."""
        with self._lock:
            handoff = self._handoffs.pop(request_id, None)
            if handoff is None:
                return
            self._num_blocks -= sum(chunk.ready.num_blocks for chunk in handoff.chunks.values())
            handoff.move(State.RELEASED)
            handoff.is_dropped = True
            # What was told of may be read as long as it is not let go.
            handoff.chunks = {
                i: chunk for i, chunk in handoff.chunks.items() if handoff.is_taken and chunk.num_complete
            }
            watchers = handoff.note([])
        tell_all(watchers)

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
            chunks = [chunk for handoff in self._handoffs.values() for chunk in handoff.chunks.values()]
            held = sum(chunk.ready.num_blocks for chunk in chunks)
            assert held == self._num_blocks, f"{self._num_blocks} blocks are counted, chunks have {held}"
            for request_id, handoff in self._handoffs.items():
                is_whole = handoff.state in (State.READY, State.CLAIMED)
                assert handoff.chunks or not is_whole, f"{request_id} is {handoff.state} and holds nothing"

    def _advance(self, handoff: Outgoing) -> None:
        """Once all is out: taken means claimed, and the last release is the end. Under the lock."""
        if handoff.state is State.READY and handoff.is_taken:
            handoff.move(State.CLAIMED)
        if handoff.state is State.CLAIMED and not handoff.chunks:
            handoff.move(State.RELEASED)
            del self._handoffs[handoff.request_id]


def _nothing() -> None:
    """Nobody waits for room."""
