"""Where reuse is lost, in cases that can be counted by hand."""

from tests.bench.prefix.losses import ELSEWHERE, FORGOTTEN, NOT_YET, Told, losses

SIZE = 4
PROMPT = tuple(range(4 * SIZE + 1))


def told(
    sent_s: float, num_cached: int, *replicas: str, prompt: tuple[int, ...] = PROMPT, first_s: float | None = None
) -> Told:
    return Told(prompt, sent_s, sent_s + 1.0 if first_s is None else first_s, num_cached, replicas)


def test_nothing_is_lost_where_all_that_was_asked_for_is_found() -> None:
    assert not any(losses([told(0, 0, "a"), told(5, 4 * SIZE, "a")], SIZE).values())
    assert not any(losses([told(0, 0, "a"), told(5, 4 * SIZE, "b")], SIZE).values()), "the tier had it"


def test_what_another_replica_has_is_lost_elsewhere() -> None:
    assert losses([told(0, 0, "a"), told(5, SIZE, "b")], SIZE) == {NOT_YET: 0, ELSEWHERE: 3 * SIZE, FORGOTTEN: 0}


def test_what_one_of_its_own_replicas_had_is_forgotten() -> None:
    assert losses([told(0, 0, "a"), told(5, 0, "b", "a")], SIZE) == {NOT_YET: 0, ELSEWHERE: 0, FORGOTTEN: 4 * SIZE}


def test_what_is_asked_for_before_it_is_computed_is_nobodys_fault() -> None:
    assert losses([told(0, 0, "a"), told(0.5, 0, "a")], SIZE) == {NOT_YET: 4 * SIZE, ELSEWHERE: 0, FORGOTTEN: 0}


def test_all_that_is_lost_is_counted_once() -> None:
    longer = (*PROMPT, *range(100, 100 + 2 * SIZE))
    asked = [
        told(0, 0, "a", prompt=PROMPT[: 2 * SIZE]),
        told(2, 0, "b"),
        told(4, 0, "b", prompt=longer, first_s=20.0),
        told(6, SIZE, "a", prompt=(*longer, 7)),
    ]
    # Of the third, b had 4 blocks; of the fourth, whose 6 blocks were asked for, 4 were there, and 2 where it went.
    expected = {NOT_YET: 2 * SIZE, ELSEWHERE: 2 * SIZE + 2 * SIZE, FORGOTTEN: 4 * SIZE + SIZE}
    assert losses(asked, SIZE) == expected
