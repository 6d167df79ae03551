"""Requests wait while there is no decode replica, and go as replicas come."""

import asyncio

import pytest

from deployments.engine.stats import EngineStats
from deployments.errors import OverloadedError, StartingError
from deployments.load.held import SPREAD_S, Held, HeldRequests, HoldBounds
from deployments.load.reading import DECODE, Reading
from tests.waiting import PATIENCE_S

SEATS = 4


class Hold:
    """Held requests, and the readings that they are told of."""

    def __init__(self, max_requests: int = 100, max_s: float = PATIENCE_S) -> None:
        self.now_s = 1000.0
        self.num_looks = 0
        self.held = HeldRequests(HoldBounds(max_requests, max_s), self._look, lambda: self.now_s)
        self.went: list[str] = []

    def _look(self) -> None:
        self.num_looks += 1

    def read(self, num_replicas: int) -> None:
        engines = {f"d{i}": EngineStats(max_num_seqs=SEATS) for i in range(num_replicas)}
        self.held.update(Reading({DECODE: engines}, self.now_s))

    async def come(self, *names: str, num_tokens: int = 10) -> list["asyncio.Task[None]"]:
        """Requests, each of which notes its name when it goes; returns when those wait that have to."""
        tasks = [asyncio.create_task(self._one(name, num_tokens)) for name in names]
        await turn()
        return tasks

    async def _one(self, name: str, num_tokens: int) -> None:
        await self.held.wait(num_tokens)
        self.went.append(name)


async def turn() -> None:
    """Whoever can go on does."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_nobody_waits_before_anything_was_read_or_while_there_is_a_replica() -> None:
    hold = Hold()
    await hold.come("early")
    hold.read(1)
    await hold.come("late")
    assert hold.went == ["early", "late"] and hold.num_looks == 0


async def test_those_who_come_while_there_is_none_wait_are_counted_and_go_in_turn_when_one_is_there() -> None:
    hold = Hold()
    hold.read(0)
    await hold.come("a", num_tokens=7)
    hold.now_s += 3.0
    await hold.come("b", "c")
    assert hold.went == [] and hold.held.now() == Held(3, 27, 3.0)
    assert hold.num_looks == 1, "readings are asked for once"
    hold.read(0)
    await turn()
    assert hold.went == []
    hold.read(1)
    await turn()
    assert hold.went == ["a", "b", "c"] and hold.held.now() == Held()


async def test_one_that_leaves_is_forgotten_at_once() -> None:
    hold = Hold()
    hold.read(0)
    leaver, _ = await hold.come("leaver", "other")
    leaver.cancel()
    await turn()
    assert hold.held.now().count == 1
    hold.read(1)
    await turn()
    assert hold.went == ["other"]


async def test_more_than_the_bound_are_refused_with_the_number_and_its_setting() -> None:
    hold = Hold(max_requests=2)
    hold.read(0)
    await hold.come("a", "b")
    with pytest.raises(OverloadedError, match=r"2 requests wait .*at most 2 may \(decode.max_queued_requests\)"):
        await hold.held.wait(1)
    assert hold.held.now().count == 2


async def test_one_that_waits_for_too_long_is_told_what_starts_and_the_bound_and_when_to_come_again() -> None:
    hold = Hold(max_s=0.01)
    hold.read(0)
    with pytest.raises(StartingError, match=r"being started did not come within 0.01 s \(ingress.max_start_s\)"):
        await hold.held.wait(1)
    assert hold.held.now() == Held() and hold.held.is_overdue
    hold.now_s += 61.0
    assert not hold.held.is_overdue, "nobody waits any more: the next one may try"
    with pytest.raises(StartingError) as refused:
        await hold.held.wait(1)
    assert hold.held.is_overdue and refused.value.retry_after_s == 10.0
    hold.read(1)
    assert not hold.held.is_overdue


async def test_who_is_refused_is_told_to_come_again_after_what_the_last_start_took() -> None:
    hold = Hold(max_s=0.01)
    hold.held = HeldRequests(HoldBounds(1, PATIENCE_S), lambda: None, lambda: hold.now_s)
    hold.read(0)
    await hold.come("a")
    hold.now_s += 42.0
    hold.read(1)
    hold.read(0)
    await hold.come("b")
    with pytest.raises(OverloadedError) as refused:
        await hold.held.wait(1)
    assert refused.value.retry_after_s == 42.0


async def test_the_first_replica_gets_no_more_than_it_has_seats_for_while_others_may_come() -> None:
    hold = Hold()
    hold.read(0)
    names = [str(i) for i in range(3 * SEATS)]
    await hold.come(*names)
    hold.read(1)
    await turn()
    assert hold.went == names[:SEATS]
    hold.read(1)
    await hold.come("late")
    assert hold.went == names[:SEATS], "it is full, and who comes later stands behind"
    hold.read(2)
    await turn()
    assert hold.went == names[: 2 * SEATS]
    hold.now_s += SPREAD_S
    hold.read(2)
    await turn()
    assert hold.went == [*names, "late"]
    await hold.come("last")
    assert hold.went[-1] == "last" and hold.held.now() == Held()
