"""What is given up, asked for and fetched follows from numbers alone."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments.kv_tier.policy import FetchPolicy, Kept, choose_victims, pause_after, room_to_make

NOW_S = 1000.0
kept = st.dictionaries(
    st.integers(),
    st.builds(Kept, st.integers(1, 100), st.floats(0, NOW_S), st.integers(1, 9)),
    max_size=12,
)


@given(kept=kept, num_bytes=st.integers(-5, 500))
def test_victims_make_the_room_that_is_asked_for_and_none_is_one_too_many(
    kept: dict[int, Kept], num_bytes: int
) -> None:
    victims = choose_victims(kept, num_bytes, NOW_S)
    freed = [kept[key].num_bytes for key in victims]
    assert len(set(victims)) == len(victims)
    assert sum(freed) >= min(num_bytes, sum(one.num_bytes for one in kept.values()))
    assert sum(freed[:-1]) < max(num_bytes, 1), "the last one was needed"
    spared = [kept[key] for key in kept if key not in victims]
    for victim in map(kept.__getitem__, victims):
        for other in spared:
            assert _byte_seconds(victim) >= _byte_seconds(other)


def _byte_seconds(one: Kept) -> float:
    return (NOW_S - one.last_use_s) * one.num_bytes


def test_of_objects_used_at_once_the_deepest_goes_first() -> None:
    chain = {depth: Kept(10, 3.0, depth) for depth in (1, 2, 3)}
    assert choose_victims(chain, 15, NOW_S) == [3, 2]


def test_what_takes_more_room_goes_after_less_time() -> None:
    kept = {"small": Kept(10, NOW_S - 30, 1), "large": Kept(40, NOW_S - 10, 1)}
    assert choose_victims(kept, 1, NOW_S) == ["large"]


@given(in_use=st.integers(0, 1000), new=st.integers(0, 1000))
def test_room_is_made_only_where_there_is_none_and_then_for_more_than_one(in_use: int, new: int) -> None:
    room = room_to_make(in_use, new, 1000)
    assert (room > 0) == (in_use + new > 1000)
    assert room == 0 or room >= in_use + new - 1000


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_copies_take_their_share_of_the_time(share: float) -> None:
    assert 0.01 / (0.01 + pause_after(0.01, share)) == pytest.approx(share)


def measured(*, token_s: float = 0.001, byte_s: float = 1e-9, lookup_s: float = 0.002) -> FetchPolicy:
    policy = FetchPolicy()
    policy.note_computed(1000, token_s * 1000)
    policy.note_lookup(lookup_s, 1000, 500)
    policy.note_fetch(byte_s * 1e6, 10**6, 0)
    return policy


def test_what_was_never_measured_is_worth_a_try_and_nothing_is_not() -> None:
    policy = FetchPolicy()
    assert policy.asks(1) and policy.fetches(1, 10**9)
    assert not policy.asks(0) and not policy.fetches(0, 0)


def test_a_fetch_has_to_be_faster_than_computing() -> None:
    assert measured().fetches(100, 10**7), "0.01 s against 0.1 s"
    assert not measured().fetches(100, 2 * 10**8), "0.2 s against 0.1 s"


def test_a_busy_engine_fetches_no_few_tokens_for_each_fetch_waits_for_two_steps() -> None:
    policy = measured()
    policy.note_wait(0.04)
    assert not policy.fetches(80, 10**6), "0.081 s against 0.08 s"
    assert policy.fetches(85, 10**6)


def test_what_waits_in_the_engine_hides_as_much_of_a_fetch() -> None:
    assert not measured().fetches(100, 2 * 10**8), "0.2 s against 0.1 s"
    assert measured().fetches(100, 2 * 10**8, 101), "0.2 s against 0.1 s behind 0.101 s of others"


def test_a_fetch_that_was_too_slow_is_tried_again_in_the_end() -> None:
    policy = measured()
    answers = [policy.fetches(100, 2 * 10**8) for _ in range(60)]
    assert not any(answers[:30]) and answers[-1]


def test_what_came_too_late_makes_the_next_fetch_look_slower() -> None:
    policy = measured()
    assert policy.fetches(100, 10**7)
    policy.note_fetch(0.1, 0, 10**7)
    assert not policy.fetches(100, 10**7)


def test_the_index_is_asked_where_it_likely_saves_more_than_the_question_takes() -> None:
    policy = measured()
    assert policy.asks(5), "half of 5 ms for 2 ms"
    assert not policy.asks(3)


def test_where_nothing_is_found_only_long_prompts_ask() -> None:
    policy = measured()
    for _ in range(100):
        policy.note_lookup(0.002, 10_000, 0)
    assert not policy.asks(39)
    assert policy.asks(41), "a twentieth of 41 ms for 2 ms"


@given(seconds=st.floats(0, 100), num_tokens=st.integers(0, 10**6))
def test_patience_has_bounds(seconds: float, num_tokens: int) -> None:
    policy = FetchPolicy()
    policy.note_computed(1000, seconds)
    assert 0.1 <= policy.patience_s(num_tokens) <= 10.0


def test_one_waits_no_longer_than_it_takes_to_compute() -> None:
    assert measured().patience_s(2000) == pytest.approx(2.0)
    assert FetchPolicy().patience_s(2000) == 2.0


def test_an_index_that_does_not_answer_is_asked_less_and_less_until_it_does() -> None:
    policy = FetchPolicy()
    assert not policy.rests(0.0)
    now_s, rests = 100.0, []
    for _ in range(9):
        policy.note_silence(now_s)
        policy.note_silence(now_s + 0.01)  # another request that had asked at the same time
        begun_s = now_s
        while policy.rests(now_s):
            now_s += 0.5
        rests.append(now_s - begun_s)
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    policy.note_silence(now_s)
    policy.note_lookup(0.001, 100, 0)
    assert not policy.rests(now_s), "it has answered one that asked before"
    policy.note_silence(now_s + 100)
    assert policy.rests(now_s + 100.9) and not policy.rests(now_s + 101)
