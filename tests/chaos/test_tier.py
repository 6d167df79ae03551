"""What is left in the tier: the index's count is held against the object store's, and both against bounds."""

from dataclasses import replace

import pytest

from tests.bench.chaos.tier import Left

MIB = 2**20
WELL = Left(
    max_bytes=200 * MIB,
    num_objects=100,
    num_bytes=100 * MIB,
    num_pending=0,
    num_accepted=150,
    num_evicted=40,
    num_given_up=10,
    num_lost=0,
    stored_bytes=120 * MIB,
    num_kept=0,
    freed_bytes=101 * MIB,
)


def test_counts_that_agree_are_no_problem() -> None:
    assert list(WELL.problems()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_accepted": 0}, "given nothing"),
        ({"max_bytes": 99 * MIB}, "allowed"),
        ({"num_pending": 1}, "on their way"),
        ({"stored_bytes": 99 * MIB}, "the object store has"),
        ({"num_kept": 1}, "left in the tier"),
        ({"freed_bytes": 50 * MIB}, "lost"),
        ({"freed_bytes": 200 * MIB}, "lost"),
    ],
)
def test_each_count_that_disagrees_is_told(change: dict[str, int], words: str) -> None:
    (problem,) = replace(WELL, **change).problems()
    assert words in problem
