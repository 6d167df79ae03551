"""What Ray's agent is told: counters by what they have grown, everything else as it is, histograms part by part."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client.core import Metric

from deployments.engine.stats import Histogram
from deployments.telemetry import ray_metrics
from deployments.telemetry.families import counter, gauge, histogram
from deployments.telemetry.ray_metrics import RayMetrics, tell_ray
from tests.waiting import until

Told = list[tuple[str, str, float, dict[str, str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What Ray was told: how, name, value, labels."""
    said: Told = []

    class Fake:
        def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
            self._name, self._tag_keys = name, tag_keys

        def _say(self, how: str, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self._tag_keys)  # as Ray demands
            said.append((how, self._name, value, tags))

        def set(self, value: float, tags: dict[str, str]) -> None:
            self._say("set", value, tags)

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0  # as Ray demands
            self._record(value, tags)

        def _record(self, value: float, tags: dict[str, str]) -> None:
            self._say("inc", value, tags)

    monkeypatch.setattr(ray_metrics, "Counter", Fake)
    monkeypatch.setattr(ray_metrics, "Gauge", Fake)
    return said


def test_a_counter_is_told_by_what_it_has_grown_from_0_on_for_each_of_its_labels(told: Told) -> None:
    metrics = RayMetrics()
    for first, second in ((0, 5), (2, 5), (3, 6)):
        metrics.tell([counter("calls", "Calls.", ("outcome",), [(("ok",), first), (("bad",), second)])])
    assert told == [
        ("inc", "kvrelay_calls_total", 0, {"outcome": "ok"}),
        ("inc", "kvrelay_calls_total", 0, {"outcome": "bad"}),
        ("inc", "kvrelay_calls_total", 5, {"outcome": "bad"}),
        ("inc", "kvrelay_calls_total", 2, {"outcome": "ok"}),
        ("inc", "kvrelay_calls_total", 1, {"outcome": "ok"}),
        ("inc", "kvrelay_calls_total", 1, {"outcome": "bad"}),
    ]


def test_gauges_and_parts_of_histograms_are_told_as_they_are_and_no_name_has_a_colon(told: Told) -> None:
    seen = Histogram((1.0, 2.0))
    seen.observe(1.5, 3)
    metrics = RayMetrics()
    metrics.tell([gauge("waiting", "Waiting.", (), [((), 4)], "vllm:"), histogram("t", "T.", ("r",), [(("a",), seen)])])
    assert told == [
        ("set", "vllm_waiting", 4, {}),
        ("set", "kvrelay_t_bucket", 0, {"r": "a", "le": "1.0"}),
        ("set", "kvrelay_t_bucket", 3, {"r": "a", "le": "2.0"}),
        ("set", "kvrelay_t_bucket", 3, {"r": "a", "le": "+Inf"}),
        ("set", "kvrelay_t_count", 3, {"r": "a"}),
        ("set", "kvrelay_t_sum", 4.5, {"r": "a"}),
    ]


async def test_a_reading_that_fails_is_said_once_and_the_next_one_is_told(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    readings: list[Any] = [OSError("gone"), OSError("gone"), gauge("waiting", "Waiting.", (), [((), 1)])]
    last = readings[-1]

    async def read() -> Iterable[Metric]:
        reading = readings.pop(0) if readings else last
        if isinstance(reading, Exception):
            raise reading
        return [reading]

    telling = asyncio.create_task(tell_ray(read, 0.001))
    await until(lambda: bool(told))
    telling.cancel()
    with suppress(asyncio.CancelledError):
        await telling
    assert told[0] == ("set", "kvrelay_waiting", 1, {})
    assert [record.getMessage() for record in caplog.records] == ["Ray's agent is told no metrics: OSError('gone')"]
