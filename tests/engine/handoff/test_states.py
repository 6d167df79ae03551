"""The hand-off's state machine: every message in every state, and leases, with a clock that the test moves."""

from dataclasses import dataclass, field, replace
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.engine.handoff.inbox import Inbox
from deployments.engine.handoff.outbox import Completion, Outbox, TakenChunk
from deployments.engine.handoff.states import State
from deployments.messages import ChunkReady, DrawnToken
from tests.engine.driving import FakeClock

LEASE_S = 10.0
KV = torch.zeros(1)
FIRST = DrawnToken(7, logprob=-0.5)


@dataclass
class Source:
    """An outbox with one hand-off of four blocks, brought to a state."""

    clock: FakeClock = field(default_factory=FakeClock)

    def __post_init__(self) -> None:
        self.outbox = Outbox(8, LEASE_S, self.clock)
        self.outbox.open("r", 0)

    def put(self, is_last: bool) -> ChunkReady:
        """Announce a chunk, and complete it at once."""
        chunk = self.outbox.put("r", 2, KV, is_last=is_last)
        self.outbox.note_copied("r", chunk.index)
        self.outbox.set_first_token("r", FIRST)
        return chunk

    def take(self, index: int) -> TakenChunk:
        taken = self.outbox.take("r", index)
        assert taken is not None and taken.tensor is KV
        return taken

    def bring_to(self, state: State) -> "Source":
        if state is State.RESERVED:
            return self
        self.put(is_last=False)
        if state is State.FILLING:
            return self
        self.put(is_last=True)
        if state is State.READY:
            return self
        for index in range(2):
            self.take(index)
        if state is State.RELEASED:
            for index in range(2):
                self.outbox.release("r", index)
        return self


@dataclass
class Target:
    """An inbox with one hand-off of blocks 1 to 4, brought to a state."""

    clock: FakeClock = field(default_factory=FakeClock)

    def __post_init__(self) -> None:
        self.inbox = Inbox(LEASE_S, self.clock)
        self.inbox.reserve("r", range(1, 5))

    def fill(self, start: int, num_blocks: int, first_token: DrawnToken | None = None) -> State:
        chunk = ChunkReady("r", 0, start, num_blocks, first_token=first_token)
        assert self.inbox.expect(chunk) == range(start, start + num_blocks)
        return self.inbox.fill(chunk)

    def bring_to(self, state: State) -> "Target":
        if state is State.FILLING:
            self.fill(1, 2)
        elif state is not State.RESERVED:
            self.fill(1, 4, first_token=FIRST)
            if state is State.RELEASED:
                self.inbox.claim("r")
        return self


SOURCE_STATES = [State.RESERVED, State.FILLING, State.READY, State.CLAIMED, State.RELEASED]
TARGET_STATES = [State.RESERVED, State.FILLING, State.READY, State.RELEASED]


@pytest.mark.parametrize("state", SOURCE_STATES)
class TestEveryStateOfTheSource:
    def test_is_reached(self, state: State) -> None:
        source = Source().bring_to(state)
        assert source.outbox.state("r") is state
        source.outbox.check_integrity()

    def test_ends_in_released_when_it_is_dropped(self, state: State) -> None:
        source = Source().bring_to(state)
        for _ in range(2):
            source.outbox.drop("r")
            assert source.outbox.state("r") is State.RELEASED and source.outbox.num_blocks == 0
        source.outbox.check_integrity()

    def test_outlives_its_lease_only_if_it_is_renewed(self, state: State) -> None:
        source = Source().bring_to(state)
        is_held = state is not State.RELEASED
        source.clock.now_s += LEASE_S - 1
        assert source.outbox.expired() == []
        assert source.outbox.renew("r") is is_held
        source.clock.now_s += LEASE_S - 1
        assert source.outbox.expired() == []
        assert source.outbox.next_expiry_s() == (1 if is_held else None)
        source.clock.now_s += 1
        assert source.outbox.expired() == (["r"] if is_held else [])

    def test_gives_no_chunk_twice_and_none_after_the_end(self, state: State) -> None:
        source = Source().bring_to(state)
        given = [source.outbox.take("r", 0) is not None for _ in range(2)]
        assert given == [state in (State.FILLING, State.READY), False]
        source.outbox.drop("r")
        assert source.outbox.take("r", 0) is None

    def test_takes_no_harm_from_a_release_that_comes_twice_or_of_nothing(self, state: State) -> None:
        source = Source().bring_to(state)
        for index in (0, 0, 9):
            source.outbox.release("r", index)
            source.outbox.release("stranger", index)
        source.outbox.check_integrity()

    def test_is_not_opened_again(self, state: State) -> None:
        source = Source().bring_to(state)
        if state is State.RELEASED:
            source.outbox.open("r", 0)
            assert source.outbox.state("r") is State.RESERVED
        else:
            with pytest.raises(AssertionError, match="handed over already"):
                source.outbox.open("r", 0)


@pytest.mark.parametrize("state", TARGET_STATES)
class TestEveryStateOfTheTarget:
    def test_is_reached(self, state: State) -> None:
        assert Target().bring_to(state).inbox.state("r") is state

    def test_ends_in_released_when_it_is_dropped(self, state: State) -> None:
        inbox = Target().bring_to(state).inbox
        first_missing = {State.RESERVED: 1, State.FILLING: 3, State.READY: 5, State.RELEASED: None}[state]
        assert inbox.drop("r") == first_missing
        assert inbox.drop("r") is None and inbox.state("r") is State.RELEASED

    def test_outlives_its_lease_only_if_it_is_renewed(self, state: State) -> None:
        target = Target().bring_to(state)
        is_held = state is not State.RELEASED
        target.clock.now_s += LEASE_S - 1
        assert target.inbox.renew("r") is is_held
        target.clock.now_s += LEASE_S - 1
        assert target.inbox.expired() == [] and target.inbox.next_expiry_s() == (1 if is_held else None)
        target.clock.now_s += 1
        assert target.inbox.expired() == (["r"] if is_held else [])

    def test_takes_a_chunk_that_comes_again_and_ignores_a_late_one(self, state: State) -> None:
        target = Target().bring_to(state)
        chunk = ChunkReady("r", 0, 1, 2)
        if state is State.RELEASED:
            assert target.inbox.expect(chunk) is None
            return
        assert target.inbox.expect(chunk) == range(1, 3)
        assert target.inbox.fill(chunk) is (State.READY if state is State.READY else State.FILLING)

    def test_skips_blocks_of_a_chunk_that_are_here_already(self, state: State) -> None:
        target = Target().bring_to(state)
        for (start, num_blocks), taken in {(0, 2): range(1, 2), (0, 5): range(1, 5), (0, 1): range(1, 1)}.items():
            expected = None if state is State.RELEASED else taken
            assert target.inbox.expect(ChunkReady("r", 0, start, num_blocks)) == expected

    def test_refuses_a_chunk_of_blocks_that_were_not_reserved(self, state: State) -> None:
        target = Target().bring_to(state)
        for start, num_blocks in ((-1, 3), (4, 2), (0, 6), (1, 0)):
            chunk = ChunkReady("r", 0, start, num_blocks)
            if state is State.RELEASED:
                assert target.inbox.expect(chunk) is None
            else:
                with pytest.raises(ValueError, match=r"range\(1, 5\) are awaited"):
                    target.inbox.expect(chunk)


def test_the_first_token_alone_or_the_blocks_alone_do_not_make_a_hand_off_whole() -> None:
    target = Target()
    assert target.fill(3, 2, first_token=FIRST) is State.FILLING
    assert target.fill(1, 2) is State.READY
    assert target.inbox.claim("r") == FIRST
    target = Target()
    assert target.fill(1, 4) is State.FILLING
    assert target.fill(1, 1, first_token=FIRST) is State.READY


def test_what_the_receiver_does_renews_the_lease_of_the_source() -> None:
    source = Source().bring_to(State.READY)
    for act in (source.outbox.take, source.outbox.release):
        source.clock.now_s += LEASE_S - 1
        act("r", 0)
        assert source.outbox.expired() == []


def test_what_is_still_said_of_a_broken_handoff_harms_no_chunk_of_the_next_one() -> None:
    source = Source()
    late = source.put(is_last=False)
    source.outbox.drop("r")
    source.outbox.open("r", 0)
    chunk = source.put(is_last=False)
    assert source.outbox.take("r", late.index) is None
    source.outbox.release("r", late.index)
    assert source.take(chunk.index).completion.done() and source.outbox.num_blocks == 2


def test_a_chunk_that_is_taken_and_not_released_still_counts() -> None:
    source = Source().bring_to(State.CLAIMED)
    assert (source.outbox.num_blocks, source.outbox.num_free_blocks) == (4, 4)
    source.outbox.release("r", 1)
    assert source.outbox.num_blocks == 2 and source.outbox.state("r") is State.CLAIMED


def test_a_chunk_may_be_taken_before_it_is_complete_and_the_last_one_waits_for_the_first_token() -> None:
    source = Source()
    chunks = [source.outbox.put("r", 2, KV, is_last=is_last) for is_last in (False, True)]
    first, last = (source.take(chunk.index).completion for chunk in chunks)
    source.outbox.note_copied("r", chunks[1].index)
    assert not first.done() and not last.done()
    source.outbox.set_first_token("r", FIRST)
    assert not first.done() and last.result() == FIRST
    source.outbox.note_copied("r", chunks[0].index)
    assert first.result() is None


def test_whoever_awaits_a_chunk_of_a_hand_off_that_is_over_is_told() -> None:
    source = Source()
    chunk = source.outbox.put("r", 2, KV, is_last=True)
    completion = source.take(chunk.index).completion
    source.outbox.drop("r")
    assert completion.cancelled()
    source.outbox.note_copied("r", chunk.index)


def test_a_chunk_that_is_not_complete_is_not_released() -> None:
    source = Source()
    chunk = source.outbox.put("r", 2, KV, is_last=True)
    source.take(chunk.index)
    source.outbox.release("r", chunk.index)
    assert source.outbox.num_blocks == 2 and source.outbox.state("r") is State.CLAIMED
    source.outbox.note_copied("r", chunk.index)
    source.outbox.set_first_token("r", FIRST)
    source.outbox.release("r", chunk.index)
    assert source.outbox.num_blocks == 0 and source.outbox.state("r") is State.RELEASED


def in_parts(source: Source) -> tuple[ChunkReady, TakenChunk]:
    """The last chunk, of three layers, taken before anything of it is there."""
    tensor = torch.arange(3.0).reshape(3, 1)
    chunk = source.outbox.put("r", 4, tensor, is_last=True, cuts=(1, 2))
    taken = source.outbox.take("r", chunk.index)
    assert taken is not None
    return chunk, taken


def test_the_parts_of_a_chunk_are_complete_one_after_the_other_and_the_first_token_comes_with_the_last() -> None:
    source = Source()
    chunk, taken = in_parts(source)
    parts = taken.parts()
    assert [(layers, float(tensor)) for layers, tensor, _ in parts] == [((0, 1), 0.0), ((1, 2), 1.0), ((2, 3), 2.0)]
    for num_copied in range(3):
        assert [completion.done() for *_, completion in parts] == [i < num_copied for i in range(3)]
        source.outbox.release("r", chunk.index)
        assert source.outbox.num_blocks == 4, "it is not complete"
        source.outbox.note_copied("r", chunk.index)
    assert [completion.done() for *_, completion in parts] == [True, True, False]
    source.outbox.set_first_token("r", FIRST)
    assert [completion.result() for *_, completion in parts] == [None, None, FIRST]
    source.outbox.release("r", chunk.index)
    assert source.outbox.state("r") is State.RELEASED


@pytest.mark.parametrize("num_copied", [0, 1, 2, 3])
def test_parts_that_are_not_there_when_a_hand_off_ends_never_will_be(num_copied: int) -> None:
    source = Source()
    chunk, taken = in_parts(source)
    for _ in range(num_copied):
        source.outbox.note_copied("r", chunk.index)
    source.outbox.drop("r")
    source.outbox.note_copied("r", chunk.index)
    parts = [completion for *_, completion in taken.parts()]
    whole = min(num_copied, 2)  # the last one waits for the first token
    assert [part.cancelled() for part in parts] == [False] * whole + [True] * (3 - whole)
    assert source.outbox.num_blocks == 0


def test_a_block_is_there_when_all_of_its_layers_are() -> None:
    inbox = Inbox(LEASE_S, FakeClock(), num_layers=3)
    inbox.reserve("r", range(1, 5))

    def fill(start: int, layers: tuple[int, int] | None, first_token: DrawnToken | None = None) -> State:
        chunk = ChunkReady("r", 0, start, 2, first_token=first_token, layers=layers)
        assert inbox.expect(chunk) == range(start, start + 2)
        return inbox.fill(chunk)

    assert fill(3, (0, 2)) is State.FILLING
    assert fill(1, (1, 3), FIRST) is State.FILLING
    assert fill(1, (1, 3), FIRST) is State.FILLING, "a part that comes again"
    assert fill(3, None) is State.FILLING, "the whole chunk, by a second prefill engine"
    assert fill(1, (0, 1)) is State.READY
    assert inbox.claim("r") == FIRST


def test_a_block_of_which_some_layers_have_come_counts_as_missing() -> None:
    inbox = Inbox(LEASE_S, FakeClock(), num_layers=3)
    inbox.reserve("r", range(1, 5))
    inbox.fill(ChunkReady("r", 0, 1, 2))
    inbox.fill(ChunkReady("r", 1, 3, 2, layers=(0, 2)))
    assert inbox.drop("r") == 3


@pytest.mark.parametrize("layers", [(-1, 2), (1, 1), (2, 1), (1, 4)])
def test_layers_that_there_are_not_are_refused(layers: tuple[int, int]) -> None:
    inbox = Inbox(LEASE_S, FakeClock(), num_layers=3)
    inbox.reserve("r", range(1, 5))
    with pytest.raises(ValueError, match="has layers"):
        inbox.expect(ChunkReady("r", 0, 1, 2, layers=layers))


class Pair(RuleBasedStateMachine):
    """An outbox and an inbox, messages that are lost, late and doubled, deaths and time: nothing stays held."""

    NUM_BLOCKS = 4

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.outbox, self.inbox = Outbox(64, LEASE_S, self.clock), Inbox(LEASE_S, self.clock)
        self.ids: list[str] = []
        self.announced: list[ChunkReady] = []
        self.sent: list[ChunkReady] = []
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
        taken = self.outbox.take(name, chunk.index)
        assert taken is not None and not taken.completion.done()
        taken.completion.add_done_callback(partial(self.note_completion, chunk))

    def note_completion(self, chunk: ChunkReady, completion: Completion) -> None:
        if not completion.cancelled():
            self.sent.append(replace(chunk, first_token=completion.result()))

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
            self.outbox.release(chunk.request_id, chunk.index)

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
