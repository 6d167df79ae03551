"""What several want at once is made once; the next one who comes has it made anew."""

import asyncio

import pytest

from deployments.telemetry.single_flight import SingleFlight


class Making:
    """Makes 1, 2, ... once it may; what is an error it raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.count = 0
        self.may_end = asyncio.Event()
        self.flight = SingleFlight[int]()
        self._error = error

    async def _make(self) -> int:
        self.count += 1
        number = self.count
        await self.may_end.wait()
        if self._error is not None:
            raise self._error
        return number

    def ask(self, times: int) -> list[asyncio.Task[int]]:
        return [asyncio.create_task(self.flight(self._make)) for _ in range(times)]


async def test_all_who_come_meanwhile_get_what_the_first_one_gets_even_if_that_one_leaves() -> None:
    making = Making()
    first, *others = making.ask(4)
    await asyncio.sleep(0)
    first.cancel()
    making.may_end.set()
    assert await asyncio.gather(*others) == [1, 1, 1]
    assert await making.flight(making._make) == 2, "nothing is kept"


async def test_an_error_comes_to_all_and_is_forgotten() -> None:
    making = Making(OSError("gone"))
    asked = making.ask(2)
    making.may_end.set()
    assert [str(error) for error in await asyncio.gather(*asked, return_exceptions=True)] == ["gone", "gone"]
    with pytest.raises(OSError, match="gone"):
        await making.flight(making._make)
    assert making.count == 2
