"""All ingress replicas are told of by each of them; one that does not answer is left out, and that is said."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.api.observer import Outcome
from deployments.serve_state import ask_each
from deployments.telemetry.client_stats import ClientCounts
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.metrics import render
from deployments.telemetry.peers import Peers
from tests.waiting import PATIENCE_S


def ingress(name: str, num_calls: int) -> IngressStats:
    counts = ClientCounts()
    for _ in range(num_calls):
        counts.request_started()
        counts.first_token(0.3)
        counts.request_finished(Outcome.OK)
    return IngressStats(name, counts.stats)


def answering(*answers: IngressStats | BaseException) -> Callable[[], Awaitable[Sequence[Any]]]:
    async def ask() -> Sequence[Any]:
        return answers

    return ask


async def samples(peers: Peers) -> dict[tuple[str, ...], float]:
    """Name and label values of each sample of the page, with its value."""
    text = render({}, await peers.read()).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_numbers_of_all_ingress_replicas_are_told_each_by_its_name() -> None:
    found = await samples(Peers(answering(ingress("b", 2), ingress("a", 0)), lambda: ingress("a", 3)))
    assert found["kvrelay_ttft_seconds_count", "b"] == 2
    assert found["kvrelay_ttft_seconds_count", "a"] == 3, "its own are as they are now"
    assert found["kvrelay_requests_total", "a", "ok"] == 3
    assert found["kvrelay_requests_total", "a", "failed"] == 0, "there from the start, so that it has a rate"
    assert found["kvrelay_ingress_replicas", "answered"] == 2
    assert found["kvrelay_ingress_replicas", "silent"] == 0


async def test_one_that_does_not_answer_is_left_out_and_counted() -> None:
    found = await samples(Peers(answering(ingress("a", 1), TimeoutError()), lambda: ingress("a", 1)))
    assert {name for metric, name, *_ in found if metric == "kvrelay_ttft_seconds_count"} == {"a"}
    assert found["kvrelay_ingress_replicas", "silent"] == 1


async def test_where_serve_does_not_say_who_they_are_those_of_before_are_silent() -> None:
    answers: list[Any] = [[ingress("a", 0), ingress("b", 0), ingress("c", 0)], RuntimeError("no controller")]

    async def ask() -> Sequence[Any]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    peers = Peers(ask, lambda: ingress("a", 1))
    assert len((await peers.read()).replicas) == 3
    reading = await peers.read()
    assert [stats.replica for stats in reading.replicas] == ["a"] and reading.num_silent == 2


class Answer:
    """What Serve has for the answer of one replica."""

    def __init__(self, value: object) -> None:
        self._value = value

    async def get_async(self) -> object:
        if isinstance(self._value, asyncio.Event):
            await self._value.wait()
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


class Broadcast:
    def __init__(self, *values: object) -> None:
        self._answers = [Answer(value) for value in values]
        self.is_known: asyncio.Future[None] | None = None  # who they are; None: at once

    def broadcast(self, method: str) -> "Broadcast":
        return self

    async def _fetch_replica_results_async(self) -> list[Answer]:
        if self.is_known is not None:
            await self.is_known
        return self._answers


async def test_the_answers_of_others_are_not_lost_for_one_that_hangs_or_fails() -> None:
    handle: Any = Broadcast("a", asyncio.Event(), RuntimeError("b"), "c")
    async with asyncio.timeout(PATIENCE_S):
        first, hung, failed, last = await ask_each(handle, "ingress_stats", 0.01)
    assert (first, last) == ("a", "c")
    assert isinstance(hung, TimeoutError) and isinstance(failed, RuntimeError)


async def test_who_is_cancelled_before_the_first_question_leaves_none_open() -> None:
    handle: Any = Broadcast("a", "b")
    loop = asyncio.get_running_loop()
    handle.is_known = loop.create_future()
    asking = asyncio.create_task(ask_each(handle, "ingress_stats", PATIENCE_S))
    await asyncio.sleep(0)
    handle.is_known.set_result(None)
    loop.call_soon(asking.cancel)  # behind what asks, before what was asked begins
    with pytest.raises(asyncio.CancelledError):
        await asking
    gc.collect()  # which tells of coroutines that nobody awaited: an error in these tests
