"""What is asked of a run: the right type of nodes, all of them gone again, and no request lost."""

import pytest

from tests.bench.autoscale.verdict import Phase, Reaction, problems, react, steps_of
from tests.bench.autoscale.watch import Moment

PHASES = (Phase("little", 10), Phase("prompts", 20, prompts=5), Phase("answers", 20, answers=5), Phase("little", 20))


def run(prefill: dict[int, int], decode: dict[int, int]) -> list[Moment]:
    """A moment each second, with so many of each pool from given seconds on; nodes, replicas and targets alike."""
    moments, counts, started = [], {"prefill": 1, "decode": 1}, {"prefill": 1, "decode": 1}
    for second in range(70):
        for pool, changes in (("prefill", prefill), ("decode", decode)):
            now = changes.get(second, counts[pool])
            started[pool] += max(0, now - counts[pool])
            counts[pool] = now
        moments.append(Moment(float(second), dict(counts), dict(counts), dict(counts), dict(started)))
    return moments


def judge(moments: list[Moment]) -> tuple[list[Reaction], list[str]]:
    reactions = [react(step, moments, least=1) for step in steps_of(PHASES)]
    return reactions, problems(reactions, num_lost=0)


def test_phases_with_more_of_something_are_steps_of_its_pool():
    prefill, decode = steps_of(PHASES)
    assert (prefill.pool, prefill.begins_s, prefill.ends_s) == ("prefill", 10, 30)
    assert (decode.pool, decode.begins_s, decode.ends_s) == ("decode", 30, 50)


def test_a_pool_that_follows_its_step_and_goes_back_is_well_and_timed():
    (prefill, decode), found = judge(run({15: 3, 40: 1}, {33: 2, 60: 1}))
    assert found == []
    assert (prefill.target_s, prefill.most_nodes, prefill.fewer_nodes_s) == (5, 3, 9)
    assert (decode.replica_s, decode.most_replicas, decode.fewer_replicas_s) == (3, 2, 9)


@pytest.mark.parametrize(
    ("prefill", "decode", "problem"),
    [
        ({}, {33: 2, 60: 1}, "more to do for prefill brought no more of its nodes or replicas"),
        ({15: 3, 40: 1}, {20: 2, 25: 1, 33: 2, 60: 1}, "more to do for prefill started 1 nodes of the other type"),
        ({15: 3, 35: 4, 40: 1}, {33: 2, 60: 1}, "more to do for decode started 1 nodes of the other type"),
        ({15: 3, 40: 1}, {33: 2}, "decode did not go back to its least"),
    ],
)
def test_what_is_not_as_asked_is_named(prefill, decode, problem):
    _, found = judge(run(prefill, decode))
    assert len(found) == 1 and problem in found[0]


def test_a_lost_request_is_a_problem():
    assert problems([], num_lost=2) == ["2 requests were lost, 0 may be"]
