"""The decode engine's side of hand-offs: sequences whose blocks are set aside."""

import time
from collections.abc import Iterator

from deployments.engine.handoff import states
from deployments.engine.handoff.states import Clock, Side, State
from deployments.messages import ChunkReady, DrawnToken


class _Incoming(Side):
    def __init__(self, expires_s: float, blocks: range, all_layers: int) -> None:
        super().__init__(expires_s)
        self.blocks = blocks
        # By the block, its layers that have not come, as bits.
        self.missing = dict.fromkeys(blocks, all_layers)
        self.first_token: DrawnToken | None = None


class Inbox:
    """For the engine's thread.

    Args:
        lease_s: a hand-off of which nobody has been heard for so long is over.
        clock: monotonic seconds.
        num_layers: whose KV a block has.
    """

    def __init__(self, lease_s: float, clock: Clock = time.monotonic, num_layers: int = 1) -> None:
        self._num_layers = num_layers
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
        self._handoffs[request_id] = _Incoming(self._clock() + self._lease_s, blocks, _bits(0, self._num_layers))

    def expect(self, chunk: ChunkReady) -> range | None:
        """Which blocks a chunk is for: its last ones, for some were here before; None: nobody waits for it any more.

        One that has come before is no error: a second prefill engine computes the same KV, and nobody reads it yet.

        Raises:
            ValueError: it has blocks that are neither set aside nor in front of those, or layers that there are not.
        """
        handoff = self._handoffs.get(chunk.request_id)
        if handoff is None:
            return None
        blocks = range(chunk.start_block, chunk.start_block + chunk.num_blocks)
        if not blocks or blocks[0] < 0 or blocks.stop > handoff.blocks.stop:
            raise ValueError(f"{chunk.request_id}: chunk {chunk.index} has {blocks}, {handoff.blocks} are awaited")
        first, end = chunk.layers or (0, self._num_layers)
        if not 0 <= first < end <= self._num_layers:
            raise ValueError(f"{chunk.request_id}: chunk {chunk.index} has layers {first} to {end - 1}")
        return range(max(blocks.start, min(blocks.stop, handoff.blocks.start)), blocks.stop)

    def fill(self, chunk: ChunkReady) -> State:
        """The blocks of a chunk that `expect` accepted are here."""
        handoff = self._handoffs[chunk.request_id]
        come = _bits(*(chunk.layers or (0, self._num_layers)))
        for block in range(chunk.start_block, chunk.start_block + chunk.num_blocks):
            if missing := handoff.missing.pop(block, 0) & ~come:
                handoff.missing[block] = missing
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
        return states.renew(self._handoffs.get(request_id), self._clock() + self._lease_s)

    def expired(self) -> list[str]:
        """Hand-offs whose lease has run out; the engine drops them."""
        return states.expired(self._handoffs, self._clock())

    def next_expiry_s(self) -> float | None:
        """Seconds until the next lease runs out; None: there is none."""
        return states.next_expiry_s(self._handoffs, self._clock())


def _bits(first: int, end: int) -> int:
    return (1 << end) - (1 << first)
