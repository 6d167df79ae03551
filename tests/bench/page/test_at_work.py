"""All are at work before anybody looks, until the end, and none fails unheard."""

import pytest

from tests.bench.page.at_work import Shift, at_work
from tests.waiting import PATIENCE_S


def test_all_are_at_work_until_the_end_and_know_their_numbers() -> None:
    begun, ended = set[int](), set[int]()

    def work(number: int, shift: Shift) -> None:
        begun.add(number)
        shift.begin()
        assert shift.is_over.wait(PATIENCE_S)
        ended.add(number)

    with at_work(3, work, PATIENCE_S):
        assert (begun, ended) == ({0, 1, 2}, set())
    assert ended == {0, 1, 2}


def test_nothing_is_looked_at_before_all_have_begun() -> None:
    def work(number: int, shift: Shift) -> None:
        if number == 0:
            shift.begin()
        shift.is_over.wait(PATIENCE_S)

    with pytest.raises(TimeoutError, match=r"1 of 2 are at work, and no other within 0\.01 s"), at_work(2, work, 0.01):
        raise AssertionError("this is not reached")


def test_what_one_of_them_raises_is_raised_whatever_follows_of_it() -> None:
    def work(number: int, shift: Shift) -> None:
        shift.begin()
        if number == 1:
            raise OSError("refused")

    with pytest.raises(OSError, match="refused") as caught, at_work(2, work, PATIENCE_S):
        raise TimeoutError("nothing came")
    assert isinstance(caught.value.__context__, TimeoutError)
