"""The hand-off of one prompt's KV between two engines, as an explicit state machine with a lease on either side.

    reserved -> filling -> ready -> claimed -> released

| | `Outbox`: the prefill engine | `Inbox`: the decode engine |
|---|---|---|
| reserved | the prompt waits or is computed | blocks are set aside |
| filling | some chunks are announced | some blocks have come |
| ready | every chunk is announced | every block and the first token are here |
| claimed | every chunk is announced, and it was given away | the sequence has its blocks and decodes |
| released | nothing is held | nothing is held |

Every other way out (an abort, a lease that ran out, the other engine's death) leads to released, from any state, once.
A lease is renewed by what the other engine does and by whoever brings the two together; an engine that hears nothing of
its peer for that long frees what it holds by itself. Knows no Ray, no transport and no pool of blocks.
"""

from collections.abc import Callable, Mapping
from enum import Enum, auto

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


class Side:
    """One side of one hand-off."""

    def __init__(self, expires_s: float) -> None:
        self.state = State.RESERVED
        self.expires_s = expires_s

    def move(self, state: State) -> None:
        """Go on; staying is no error."""
        assert state is self.state or state in _NEXT[self.state], f"from {self.state} to {state}"
        self.state = state


def renew(side: Side | None, expires_s: float) -> bool:
    """Have its lease run out then; False: there is none."""
    if side is None:
        return False
    side.expires_s = expires_s
    return True


def expired(sides: Mapping[str, Side], now_s: float) -> list[str]:
    """Those whose lease has run out."""
    return [request_id for request_id, side in sides.items() if side.expires_s <= now_s]


def next_expiry_s(sides: Mapping[str, Side], now_s: float) -> float | None:
    """Seconds until the next lease runs out; None: there is none."""
    return min((max(0.0, side.expires_s - now_s) for side in sides.values()), default=None)
