"""The hand-off's state machine: every message in every state, and leases, with a clock that the test moves."""

import weakref
from dataclasses import dataclass, field
from threading import Event, Thread

import pytest
import torch

from deployments.engine.handoff.inbox import Inbox
from deployments.engine.handoff.outbox import Outbox, TakenHandoff
from deployments.engine.handoff.outgoing import End, Part, Word
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
    handoff: TakenHandoff | None = None

    def __post_init__(self) -> None:
        self.outbox = Outbox(8, LEASE_S, self.clock)
        self.outbox.open("r", 0)

    def put(self, is_last: bool) -> ChunkReady:
        """Announce a chunk, and complete it at once."""
        chunk = self.outbox.put("r", 2, KV, is_last=is_last)
        self.outbox.note_copied("r", chunk.index)
        self.outbox.set_first_token("r", FIRST)
        return chunk

    def take(self) -> TakenHandoff:
        taken = self.outbox.take("r")
        assert taken is not None
        self.handoff = taken
        return taken

    def watch(self) -> list[Word]:
        """What is told of it, from now on."""
        words: list[Word] = []
        (self.handoff or self.take()).watch(words.append)
        return words

    def bring_to(self, state: State) -> "Source":
        if state is State.RESERVED:
            return self
        self.put(is_last=False)
        if state is State.FILLING:
            return self
        self.put(is_last=True)
        if state is State.READY:
            return self
        taken = self.take()
        if state is State.RELEASED:
            for index in range(2):
                taken.release(index)
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

    def test_is_given_away_once_and_not_after_its_end(self, state: State) -> None:
        source = Source().bring_to(state)
        given = [source.outbox.take("r") is not None for _ in range(2)]
        assert given == [state in (State.RESERVED, State.FILLING, State.READY), False]
        source.outbox.drop("r")
        assert source.outbox.take("r") is None

    def test_takes_no_harm_from_a_release_that_comes_twice_or_of_nothing(self, state: State) -> None:
        source = Source().bring_to(state)
        taken = source.handoff or source.outbox.take("r")
        assert taken is not None
        for index in (0, 0, 9):
            taken.release(index)
            source.outbox.check_integrity()

    def test_holds_nothing_once_it_is_let_go(self, state: State) -> None:
        source = Source().bring_to(state)
        taken = source.handoff or source.outbox.take("r")
        assert taken is not None
        for _ in range(2):
            taken.let_go()
            assert source.outbox.num_blocks == 0
            source.outbox.check_integrity()
        is_whole = state in (State.READY, State.CLAIMED, State.RELEASED)
        assert source.outbox.state("r") is (State.RELEASED if is_whole else state)

    def test_tells_whoever_comes_late_what_there_is_and_how_it_ended(self, state: State) -> None:
        source = Source().bring_to(state)
        taken = source.handoff or source.outbox.take("r")
        assert taken is not None
        words: list[Word] = []
        taken.watch(words.append)
        num_chunks = {State.RESERVED: 0, State.FILLING: 1, State.RELEASED: 0}.get(state, 2)
        end = [] if state in (State.RESERVED, State.FILLING) else [End.WHOLE]
        assert [isinstance(word, Part) for word in words] == [True] * num_chunks + [False] * len(end)
        assert words[num_chunks:] == end
        source.outbox.drop("r")
        again: list[Word] = []
        taken.watch(again.append)
        ended_before = state is State.RELEASED
        assert again == ([End.WHOLE] if ended_before else [End.GONE])

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
    source.clock.now_s += LEASE_S - 1
    taken = source.take()
    for index in range(2):
        assert source.outbox.expired() == []
        source.clock.now_s += LEASE_S - 1
        taken.release(index)
    assert source.outbox.state("r") is State.RELEASED


def test_what_is_still_said_of_a_broken_handoff_harms_no_chunk_of_the_next_one() -> None:
    source = Source()
    late, before = source.put(is_last=False), source.take()
    source.outbox.drop("r")
    source.outbox.open("r", 0)
    source.outbox.put("r", 2, KV, is_last=False)
    words: list[Word] = []
    source.take().watch(words.append)
    source.outbox.note_copied("r", late.index)
    before.release(late.index)
    before.let_go()
    assert words == [] and source.outbox.num_blocks == 2


def test_a_chunk_that_was_told_of_and_not_released_still_counts() -> None:
    source = Source().bring_to(State.CLAIMED)
    assert (source.outbox.num_blocks, source.outbox.num_free_blocks) == (4, 4)
    assert source.handoff is not None
    source.handoff.release(1)
    assert source.outbox.num_blocks == 2 and source.outbox.state("r") is State.CLAIMED


def parts_of(words: list[Word]) -> list[Part]:
    return [word for word in words if isinstance(word, Part)]


def test_chunks_are_told_of_when_they_are_complete_and_the_last_one_waits_for_the_first_token() -> None:
    source = Source()
    words = source.watch()
    first, last = (source.outbox.put("r", 2, KV, is_last=is_last) for is_last in (False, True))
    source.outbox.note_copied("r", last.index)
    assert words == []
    source.outbox.set_first_token("r", FIRST)
    assert [(part.chunk.index, part.chunk.first_token) for part in parts_of(words)] == [(last.index, FIRST)]
    assert len(words) == 1, "the first chunk is not there yet"
    source.outbox.note_copied("r", first.index)
    assert [part.chunk.index for part in parts_of(words)] == [last.index, first.index]
    assert parts_of(words)[1].chunk.first_token is None and words[-1] is End.WHOLE
    source.outbox.drop("r")
    assert len(words) == 3, "all was told"


def test_whoever_awaits_a_hand_off_that_is_over_is_told() -> None:
    source = Source()
    words = source.watch()
    chunk = source.outbox.put("r", 2, KV, is_last=True)
    source.outbox.drop("r")
    source.outbox.note_copied("r", chunk.index)
    assert words == [End.GONE]


def test_what_was_told_of_stays_in_memory_until_it_is_released_also_behind_the_end() -> None:
    source, tensors = Source(), [torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    source.take()
    refs = [weakref.ref(tensor) for tensor in tensors]
    chunks = [source.outbox.put("r", 1, tensors.pop(0), is_last=False) for _ in range(3)]
    for chunk in chunks[:2]:
        source.outbox.note_copied("r", chunk.index)
    source.outbox.drop("r")
    assert source.outbox.num_blocks == 0
    assert [ref() is not None for ref in refs] == [True, True, False], "the last one was not complete"
    assert source.handoff is not None
    source.handoff.release(chunks[0].index)
    assert [ref() is not None for ref in refs] == [False, True, False]
    source.handoff.let_go()
    assert refs[1]() is None and source.outbox.num_blocks == 0


def test_a_chunk_that_is_not_complete_is_not_released() -> None:
    source = Source()
    chunk, taken = source.outbox.put("r", 2, KV, is_last=True), source.take()
    taken.release(chunk.index)
    taken.let_go()
    assert source.outbox.num_blocks == 2 and source.outbox.state("r") is State.CLAIMED
    source.outbox.note_copied("r", chunk.index)
    source.outbox.set_first_token("r", FIRST)
    taken.release(chunk.index)
    assert source.outbox.num_blocks == 0 and source.outbox.state("r") is State.RELEASED


def test_whoever_waits_for_room_is_told_when_there_is_some() -> None:
    source = Source().bring_to(State.CLAIMED)
    told: list[int] = []
    source.outbox.when_released(lambda: told.append(source.outbox.num_free_blocks))
    assert source.handoff is not None
    for index in (0, 0, 9):
        source.handoff.release(index)
    assert told == [6]
    source.handoff.let_go()
    source.handoff.let_go()
    assert told == [6, 8]


def in_parts(source: Source) -> tuple[ChunkReady, list[Word]]:
    """The last chunk, of three layers, and what is told of it."""
    words = source.watch()
    return source.outbox.put("r", 4, torch.arange(3.0).reshape(3, 1), is_last=True, cuts=(1, 2)), words


def test_the_parts_of_a_chunk_are_complete_one_after_the_other_and_the_first_token_comes_with_the_last() -> None:
    source = Source()
    chunk, words = in_parts(source)
    assert source.handoff is not None
    for num_copied in range(3):
        assert len(words) == num_copied
        source.handoff.release(chunk.index)
        assert source.outbox.num_blocks == 4, "it is not complete"
        source.outbox.note_copied("r", chunk.index)
    assert len(words) == 2
    source.outbox.set_first_token("r", FIRST)
    parts = parts_of(words)
    assert [(part.chunk.layers, float(part.kv)) for part in parts] == [((0, 1), 0.0), ((1, 2), 1.0), ((2, 3), 2.0)]
    assert [part.chunk.first_token for part in parts] == [None, None, FIRST]
    assert {part.num_parts for part in parts} == {3} and words[-1] is End.WHOLE
    source.handoff.release(chunk.index)
    assert source.outbox.state("r") is State.RELEASED


@pytest.mark.parametrize("num_copied", [0, 1, 2, 3])
def test_parts_that_are_not_there_when_a_hand_off_ends_never_will_be(num_copied: int) -> None:
    source = Source()
    chunk, words = in_parts(source)
    for _ in range(num_copied):
        source.outbox.note_copied("r", chunk.index)
    source.outbox.drop("r")
    source.outbox.note_copied("r", chunk.index)
    assert len(parts_of(words)) == min(num_copied, 2), "the last one waits for the first token"
    assert words[-1] is End.GONE and source.outbox.num_blocks == 0


def test_what_is_told_from_several_threads_keeps_its_order_and_none_waits_for_another() -> None:
    source = Source()
    words: list[Word] = []
    is_telling, may_go_on = Event(), Event()

    def note(word: Word) -> None:
        if not words:
            is_telling.set()
            assert may_go_on.wait(60)
        words.append(word)

    source.take().watch(note)
    chunks = [source.outbox.put("r", 2, KV, is_last=is_last) for is_last in (False, True)]
    teller = Thread(target=source.outbox.note_copied, args=("r", chunks[0].index))
    teller.start()
    assert is_telling.wait(60)
    source.outbox.note_copied("r", chunks[1].index)
    source.outbox.set_first_token("r", FIRST)
    assert words == [], "left to the one that tells"
    may_go_on.set()
    teller.join()
    assert [part.chunk.index for part in parts_of(words)] == [chunk.index for chunk in chunks]
    assert words[-1] is End.WHOLE


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
