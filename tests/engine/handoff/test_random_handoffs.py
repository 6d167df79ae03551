"""Both sides of hand-offs, through random sequences of lost, late and doubled messages, deaths and time."""

from functools import partial

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.engine.handoff.inbox import Inbox
from deployments.engine.handoff.outbox import Outbox, TakenHandoff
from deployments.engine.handoff.outgoing import End, Part, Word
from deployments.engine.handoff.states import State
from deployments.messages import ChunkReady, DrawnToken
from tests.engine.driving import FakeClock

LEASE_S = 10.0
KV = torch.zeros(1)
FIRST = DrawnToken(7, logprob=-0.5)


class Pair(RuleBasedStateMachine):
    """An outbox and an inbox, messages that are lost, late and doubled, deaths and time: nothing stays held."""

    NUM_BLOCKS = 4

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.outbox, self.inbox = Outbox(64, LEASE_S, self.clock), Inbox(LEASE_S, self.clock)
        self.ids: list[str] = []
        self.taken: dict[str, TakenHandoff] = {}
        self.announced: list[ChunkReady] = []
        self.sent: list[ChunkReady] = []
        self.ends: list[tuple[str, End]] = []
        self.claimed: set[str] = set()

    @rule(first_block=st.integers(0, NUM_BLOCKS - 1))
    def begin(self, first_block: int) -> None:
        name = f"r{len(self.ids)}"
        self.ids.append(name)
        self.inbox.reserve(name, range(first_block, self.NUM_BLOCKS))
        self.outbox.open(name, first_block)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), size=st.integers(1, NUM_BLOCKS))
    def compute(self, data: st.DataObject, size: int) -> None:
        name = data.draw(st.sampled_from(self.ids))
        if self.outbox.state(name) not in (State.RESERVED, State.FILLING):
            return
        left = self.NUM_BLOCKS - self.outbox.next_block(name)
        size = min(size, left, self.outbox.num_free_blocks)
        if size == 0:
            return
        chunk = self.outbox.put(name, size, KV, is_last=size == left)
        self.announced.append(chunk)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.ids))
        if (taken := self.outbox.take(name)) is not None:
            assert name not in self.taken, "given away twice"
            self.taken[name] = taken
            taken.watch(partial(self.note_word, name))

    def note_word(self, name: str, word: Word) -> None:
        assert name not in dict(self.ends), "told behind the end"
        if isinstance(word, Part):
            self.sent.append(word.chunk)
        else:
            self.ends.append((name, word))

    @precondition(lambda self: self.announced)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        """Any chunk that was ever announced, also again, and of a hand-off that is over."""
        chunk = data.draw(st.sampled_from(self.announced))
        self.outbox.note_copied(chunk.request_id, chunk.index)

    @precondition(lambda self: self.announced)
    @rule(data=st.data())
    def draw_first_token(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.announced)).request_id
        if name in self.outbox and self.outbox.state(name) is not State.FILLING:
            self.outbox.set_first_token(name, FIRST)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), releases=st.booleans())
    def deliver(self, data: st.DataObject, releases: bool) -> None:
        """Any chunk that was ever complete, in any order, also again."""
        chunk = data.draw(st.sampled_from(self.sent))
        if self.inbox.expect(chunk) is not None and self.inbox.fill(chunk) is State.READY:
            assert self.inbox.claim(chunk.request_id) == FIRST
            assert chunk.request_id not in self.claimed, "claimed twice"
            self.claimed.add(chunk.request_id)
        if releases:
            self.taken[chunk.request_id].release(chunk.index)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        """Nobody refers to it any more."""
        self.taken[data.draw(st.sampled_from(sorted(self.taken)))].let_go()

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), where=st.sampled_from(["source", "target", "both"]))
    def cancel(self, data: st.DataObject, where: str) -> None:
        name = data.draw(st.sampled_from(self.ids))
        if where != "target":
            self.outbox.drop(name)
        if where != "source":
            self.inbox.drop(name)

    @rule(where=st.sampled_from(["source", "target"]))
    def die(self, where: str) -> None:
        """An engine is gone with all it held, and another takes its place, which knows nothing."""
        if where == "source":
            self.outbox = Outbox(64, LEASE_S, self.clock)
        else:
            self.inbox = Inbox(LEASE_S, self.clock)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 3, LEASE_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        for name in self.outbox.expired():
            self.outbox.drop(name)
        for name in self.inbox.expired():
            self.inbox.drop(name)

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        """As the front does: each side is renewed only if the other is there."""
        name = data.draw(st.sampled_from(self.ids))
        if self.inbox.renew(name):
            self.outbox.renew(name)

    @invariant()
    def every_chunk_counts_once(self) -> None:
        self.outbox.check_integrity()

    def teardown(self) -> None:
        """Nobody does anything any more: the leases alone must end everything."""
        self.wait(LEASE_S)
        assert len(self.outbox) == len(self.inbox) == self.outbox.num_blocks == 0
        assert self.outbox.next_expiry_s() is self.inbox.next_expiry_s() is None


TestPair = Pair.TestCase
TestPair.settings = settings(max_examples=150, stateful_step_count=40)
