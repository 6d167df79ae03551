"""Pairs of looks say what differs, whatever the machine does meanwhile; CPU is counted finely."""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from deployments.api import live_page
from tests.bench.serving import seeing
from tests.bench.serving.analysis import pair_up
from tests.bench.serving.server import _cpu_clock


def test_a_machine_that_gets_slower_changes_no_ratio() -> None:
    told = pair_up([(1.1 * speed, speed) for speed in (1.0, 1.0, 2.0, 4.0, 4.0)])
    assert (told.ratio, told.low, told.high) == pytest.approx((1.1, 1.1, 1.1))
    assert (told.first, told.second, told.more, told.count) == pytest.approx((2.2, 2.0, 0.2, 5))


def test_one_pair_that_was_disturbed_is_told_by_the_spread_and_not_by_the_ratio() -> None:
    told = pair_up([(1.0, 1.0), (1.02, 1.0), (1.04, 1.0), (9.0, 1.0)])
    assert told.ratio == pytest.approx(1.03)
    assert told.low == pytest.approx(1.015) and told.high > 1.04


def test_cpu_of_a_process_is_told_between_two_ticks() -> None:
    for _ in range(3):
        before_s = time.process_time()
        told_s = time.clock_gettime(_cpu_clock(os.getpid()))
        assert before_s <= told_s <= time.process_time()


class FakeBench:
    """Looks of so many rounds, which take no time."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.window_s = rounds, 0.0
        self.servers = {seeing.ON: object(), seeing.OFF: object()}

    async def idle(self) -> None: ...

    async def cost(self, name: str, num_streams: int) -> dict[str, Any]:
        return {"cpu_us_per_token": 1e4 / num_streams, "tokens_per_s": 50.0 * num_streams}


def test_looks_come_in_pairs_watched_and_not_and_who_is_first_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked: list[tuple[str, str, bool]] = []
    is_watched = False

    @asynccontextmanager
    async def watched(server: object) -> AsyncIterator[None]:
        nonlocal is_watched
        is_watched = True
        yield
        is_watched = False

    def look(what: str, figures: dict[str, float]) -> Callable[[str], Awaitable[dict[str, Any]]]:
        async def taken(name: str) -> dict[str, Any]:
            looked.append((what, name, is_watched))
            return {key: value * (1.02 if name == seeing.ON else 1.0) for key, value in figures.items()}

        return taken

    shown = {what: {key: 5.0 for key, *_ in figures} for what, figures in seeing._SHOWN.items()}
    bench: Any = FakeBench(2)
    assert seeing.looks(bench).keys() == shown.keys(), "all that is looked at is shown"
    monkeypatch.setattr(seeing, "watched", watched)
    monkeypatch.setattr(seeing, "looks", lambda _: {what: look(what, figures) for what, figures in shown.items()})
    report = asyncio.run(seeing.measure(bench))

    assert all(is_watched == (name == seeing.ON) for _, name, is_watched in looked)
    pairs = [looked[n : n + 2] for n in range(0, len(looked), 2)]
    assert all(first[0] == second[0] and first[1] != second[1] for first, second in pairs)
    first_of = {what: [pair[0][1] for pair in pairs if pair[0][0] == what] for what in shown}
    assert all(sorted(first) == [seeing.OFF, seeing.ON] for first in first_of.values())
    seeing.show(report)
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if "8 streams, us/token" in line and "128" not in line
    ]
    assert line.split()[-8:] == ["5.1", "5.0", "0.10", "1.020", "1.020", "-", "1.020", "2"]


def test_the_service_is_watched_as_often_as_the_live_page_asks() -> None:
    page = (Path(live_page.__file__).parent / "live" / "main.js").read_text()
    (period_ms,) = re.findall(r"^const PERIOD_MS = (\d+);$", page, re.MULTILINE)
    assert seeing.WATCHED["/live"] == int(period_ms) / 1000
