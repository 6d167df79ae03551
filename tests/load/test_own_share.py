"""A queue is what was read, corrected by what this replica knows of its own part since; nothing counts twice."""

import random
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given

from deployments.load.own_share import Entry, OwnShare


def entered(*amounts: int) -> tuple[OwnShare, list[Entry]]:
    """What was let in at 1.0."""
    own = OwnShare()
    return own, [own.enter(amount, 1.0) for amount in amounts]


def entered_and_read(*amounts: int) -> tuple[OwnShare, list[Entry]]:
    """The same, with a reading of 5.0 that contains it all."""
    own, entries = entered(*amounts)
    own.note_reading(5.0, 5.0)
    return own, entries


def test_before_any_reading_what_was_let_in_counts_for_each_replica() -> None:
    own, _ = entered(100)
    assert own.whole(0, 0, 1) == 100
    assert own.whole(0, 0, 3) == 300


def test_what_was_let_in_since_the_reading_comes_on_top_of_what_is_left_of_it() -> None:
    own = OwnShare()
    own.note_reading(10.0, 10.0)
    own.enter(100, 11.0)
    assert own.whole(500, 200, 1) == 400


def test_what_is_given_up_is_taken_off_at_once_and_once() -> None:
    own, (first, second) = entered_and_read(8000, 300)
    own.leave(first, 6.0, is_drained=False)
    assert own.whole(8300, 0, 1) == 300
    own.note_reading(7.0, 7.0)
    assert own.whole(300, 0, 1) == 300, "the next reading knows"
    own.leave(second, 7.1, is_drained=False)
    assert own.whole(300, 0, 1) == 0


def test_a_reading_that_crossed_an_abort_is_corrected_too() -> None:
    own, (gone,) = entered(8000)
    own.leave(gone, 6.0, is_drained=False)
    own.note_reading(6.1, 6.2)
    assert own.whole(8000, 0, 1) == 0
    own.note_reading(7.0, 7.0)
    assert own.whole(8000, 0, 1) == 8000, "they are another's by now"


def test_what_a_long_reading_may_contain_already_does_not_count_twice() -> None:
    own = OwnShare()
    own.enter(1000, 11.0)
    own.note_reading(10.0, 12.0)
    assert own.whole(1000, 0, 1) == 1000


def test_what_is_done_since_the_reading_is_not_waited_for_though_no_speed_is_known() -> None:
    own, (entry,) = entered_and_read(1000)
    own.leave(entry, 5.5, is_drained=True)
    assert own.whole(700, 0, 1) == 0


def test_what_is_given_up_and_what_time_has_drained_of_others_are_different_tokens() -> None:
    own, (gone,) = entered_and_read(50)
    own.leave(gone, 6.0, is_drained=False)
    assert own.whole(100, 20, 1) == 30


def test_what_is_done_and_what_time_has_drained_are_the_same_tokens() -> None:
    own, (done, _) = entered_and_read(100, 900)
    own.leave(done, 6.0, is_drained=True)
    assert own.whole(1000, 100, 1) == 900


def test_the_parts_of_other_replicas_stay() -> None:
    own, (gone,) = entered_and_read(1000)
    own.leave(gone, 5.5, is_drained=False)
    assert own.whole(3000, 0, 3) == 2000


@dataclass
class Engine:
    """What one replica lets in, on its way to an engine that takes its time."""

    own: OwnShare = field(default_factory=OwnShare)
    now_s: float = 0.0
    open: dict[Entry, float] = field(default_factory=dict)  # tokens left

    def compute(self, num_tokens: float) -> None:
        for entry in list(self.open):
            done = min(num_tokens, self.open[entry])
            self.open[entry] -= done
            num_tokens -= done
            if not self.open[entry]:
                del self.open[entry]
                self.own.leave(entry, self.now_s, is_drained=True)


steps = st.lists(
    st.tuples(st.sampled_from(["enter", "give up", "compute", "read"]), st.integers(1, 1000), st.floats(0, 1.5)),
    max_size=60,
)


@given(steps=steps, seed=st.integers())
def test_of_a_single_replica_there_is_never_more_than_it_has_and_nothing_once_all_have_left(
    steps: list[tuple[str, int, float]], seed: int
) -> None:
    engine, rng, seen = Engine(), random.Random(seed), 0.0
    own = engine.own
    for kind, amount, pause_s in steps:
        engine.now_s += pause_s
        if kind == "enter":
            engine.open[own.enter(amount, engine.now_s)] = amount
        elif kind == "give up" and engine.open:
            entry = rng.choice(list(engine.open))
            del engine.open[entry]
            own.leave(entry, engine.now_s, is_drained=False)
        elif kind == "compute":
            engine.compute(amount)
        elif kind == "read":
            seen = sum(engine.open.values())
            own.note_reading(engine.now_s, engine.now_s)
            assert own.whole(seen, 0, 1) <= own.total
        assert 0 <= own.whole(seen, 0, 1) <= own.total == sum(entry.amount for entry in engine.open)
    for entry in engine.open:
        own.leave(entry, engine.now_s, is_drained=False)
    assert own.whole(seen, 0, 1) == 0
    own.note_reading(engine.now_s + 1, engine.now_s + 1)
    assert own.num_noted == 0


@given(sizes=st.lists(st.integers(1, 1000), max_size=20), others=st.integers(0, 5000), replicas=st.integers(1, 3))
def test_a_reading_with_which_nothing_has_changed_since_is_taken_as_it_is(
    sizes: list[int], others: int, replicas: int
) -> None:
    own = OwnShare()
    for size in sizes:
        own.enter(size, 0.0)
    own.note_reading(10.0, 10.0)
    assert own.whole(sum(sizes) + others, 0, replicas) == sum(sizes) + others
