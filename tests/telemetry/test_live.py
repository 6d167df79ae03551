"""The document of the live page: its figures are those of what was done, over all ingress replicas, as JSON."""

import asyncio
import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api import sse
from deployments.engine.stats import LATENCY_BUCKETS_S, Histogram
from deployments.load.reading import DECODE, PREFILL
from deployments.planner.shared import Decision
from deployments.telemetry.history import SLOT_S, ClientHistory, ClientSlot
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.live import SILENT_S, Past, ServiceState, describe, quantiles
from deployments.telemetry.live_view import LiveView
from tests.telemetry.minutes import Service

STATE = ServiceState("model", "disaggregated", "1", (True, ""))


def told(service: Service, state: ServiceState = STATE, others: Sequence[ClientHistory] = ()) -> Any:
    return json.loads(sse.to_json(describe(state, service.history, others, service.now_s)))


def busy() -> Service:
    """Five idle seconds; then, in each, 80 tokens of prompts computed by prefill, 20 found by decode, 10 generated."""
    service = Service()
    prefill, decode = service.start(PREFILL, "p"), service.start(DECODE, "d")
    service.run(5)

    def work() -> None:
        prefill.prompt_tokens += 80
        decode.prefix_hit_tokens += 20
        decode.generated_tokens += 10
        service.clients.first_token(0.3)
        service.clients.inter_token(0.02, 10)

    service.run(60, work)
    return service


def test_figures_are_those_of_what_was_done():
    document = told(busy())
    tokens, prompts = document["tokens"], document["prompts"]
    assert document["window_s"] == 65.0
    assert (tokens["ratio"], tokens["computed"], tokens["generated"]) == (10.0, 60 * 80, 60 * 10)
    assert tokens["generated_per_s"] == pytest.approx(600 / 65)
    assert prompts["cached_share"] == pytest.approx(0.2)
    assert {name: share for name, share in prompts["tokens"].items() if share} == {
        "prefill": 60 * 80,
        "decode_cache": 60 * 20,
    }
    assert 0.25 < document["latency"]["ttft_s"]["p50"] <= 0.5
    assert document["latency"]["itl_s"]["count"] == 600
    curves = document["history"]
    assert {len(curve) for name, curve in curves.items() if name != "slot_s"} == {120}
    assert curves["computed_per_s"][-2] == 80.0 and curves["computed_per_s"][0] is None
    assert curves["ttft_p95_s"][0] is None and 0.25 < curves["ttft_p95_s"][-2] <= 0.5


def test_nothing_is_known_of_a_service_that_has_just_started():
    document = told(Service())
    assert document["latency"]["ttft_s"] == {"count": 0, "p50": None, "p95": None, "p99": None}
    assert (document["tokens"]["ratio"], document["prompts"]["cached_share"]) == (None, None)
    assert document["pools"] == {pool: {"replicas": [], "states": {}} for pool in ("prefill", "decode")}


def test_replicas_are_busy_silent_or_gone():
    service = busy()
    service.engines[PREFILL]["p"].num_running = 1
    service.start(DECODE, "e")
    service.run(1)
    del service.engines[DECODE]["e"]
    service.silent_s["d"] = SILENT_S + 9.0
    service.run(1)
    states = {
        replica["name"]: (replica["state"], replica["since_s"])
        for pool in told(service)["pools"].values()
        for replica in pool["replicas"]
    }
    assert states == {"p": ("busy", 0.0), "d": ("silent", SILENT_S + 9.0), "e": ("gone", 0.0)}


def test_a_service_that_may_sleep_says_whether_it_does_and_whether_it_wakes():
    service, asleep = Service(), replace(STATE, may_sleep=True)
    assert told(service, asleep)["health"]["reason"] == "", "nothing was read"
    service.run(1)
    asleep_health = {"status": "ok", "reason": "no decode replica runs, the next request starts one"}
    assert told(service, asleep)["health"] == asleep_health
    waking = replace(asleep, states={DECODE: {"STARTING": 1}})
    assert told(service, waking)["health"] == {"status": "ok", "reason": "a decode replica is starting"}
    assert told(service)["health"]["reason"] == "", "this one may not"
    service.start(DECODE, "d")
    service.run(1)
    assert told(service, waking)["health"] == {"status": "ok", "reason": ""}


def test_what_nobody_has_read_for_long_counts_as_silence():
    service = busy()
    service.now_s += 20
    (replica,) = told(service)["pools"][PREFILL]["replicas"]
    assert (replica["state"], replica["since_s"]) == ("silent", 20.0)


def test_what_is_kept_of_slots_that_have_ended_is_what_would_be_found_anew():
    service, past, colocated = busy(), Past(), replace(STATE, mode="colocated")
    other = ClientHistory("j", {})
    for second in range(400):
        if second % 100 < 90:
            service.run(1)
        else:
            service.now_s += 1  # nobody answers
        service.clients.first_token(0.3)
        if second % 7 == 0:
            number = service.history.slots[-1].number
            other = ClientHistory("j", {number: ClientSlot(ttft=tuple(range(len(LATENCY_BUCKETS_S) + 1)))})
        others, state = [other] * (second // 50 % 2), colocated if second > 300 else STATE
        kept = describe(state, service.history, others, service.now_s, past)
        assert kept == describe(state, service.history, others, service.now_s), second


def test_slots_that_have_ended_are_looked_through_once(monkeypatch: pytest.MonkeyPatch):
    service, past, times = busy(), Past(), count()
    monkeypatch.setattr("deployments.telemetry.live._curves", lambda *_: next(times))
    for _ in range(20):
        service.run(1)
        document = describe(STATE, service.history, (), service.now_s, past)
    assert document["history"] == 20 / SLOT_S


def test_what_clients_of_other_ingress_replicas_saw_is_added():
    service = busy()
    alone = told(service)["latency"]["ttft_s"]["count"]
    number = service.history.slots[-1].number
    slow = tuple(5 if bound == 10.0 else 0 for bound in (*LATENCY_BUCKETS_S, None))
    other = ClientHistory("j", {number: ClientSlot(ttft=slow), number + 1: ClientSlot(ttft=slow)})
    document = told(service, others=[other])
    assert document["latency"]["ttft_s"]["count"] == alone + 10
    assert document["latency"]["ttft_s"]["p99"] > 5.0
    assert document["ingresses"] == {"asked": 2, "answered": 2}


def test_decisions_and_refusals_are_told_with_their_reasons():
    service = busy()
    service.refusals["ttft", "low"] += 3
    service.run(5)
    decision = Decision(1.0, {"decode": 1}, {"decode": 2}, "because", False)
    state = ServiceState("m", "colocated", "1", (False, "the decode pool hangs"), is_planned=True, decisions=[decision])
    document = told(service, state)
    assert document["planner"]["decisions"][0]["reason"] == "because"
    assert document["refusals"] == [{"reason": "ttft", "priority": "low", "count": 3}]
    assert document["health"] == {"status": "unavailable", "reason": "the decode pool hangs"}
    assert document["pools"].keys() == {"decode"}


@given(st.lists(st.floats(min_value=0.0005, max_value=59.0), min_size=1, max_size=200))
def test_a_quantile_is_in_the_bucket_of_the_value_that_has_that_rank(values):
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    found: Any = quantiles(histogram.counts)
    bounds = [0.0, *LATENCY_BUCKETS_S]
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        exact = sorted(values)[math.ceil(share * len(values)) - 1]
        low, high = next((low, high) for low, high in pairwise(bounds) if low < exact <= high)
        assert low <= found[name] <= high


@given(st.floats(min_value=0.005, max_value=60.0), st.integers(1, 1000))
def test_from_5_ms_on_a_percentile_of_equal_values_is_off_by_less_than_its_bucket_is_long(value, count):
    histogram = Histogram()
    histogram.observe(value, count)
    found: Any = quantiles(histogram.counts)
    assert all(0.6 * value <= found[name] <= 1.67 * value for name in ("p50", "p95", "p99"))


async def test_however_many_look_the_others_are_asked_once_and_only_where_there_are_some():
    asked = []
    num_ingresses = 1

    async def look(seen: Hashable) -> ServiceState:
        return ServiceState("m", "disaggregated", "1", (True, ""), num_ingresses=num_ingresses)

    async def ask_all():
        asked.append(1)
        return [ClientHistory("other", {}), ClientHistory("me", {}), TimeoutError()]

    def view() -> LiveView:
        return LiveView(lambda: IngressStats("me"), look, ask_all)

    await view().document((True, ""))
    assert not asked
    num_ingresses = 3
    watched = view()
    first = await watched.document((True, ""))
    assert await watched.document((True, "")) is first and len(asked) == 1
    assert first["ingresses"] == {"asked": 3, "answered": 2}


async def test_those_who_look_at_once_share_one_document_even_where_the_first_one_leaves():
    may_answer, looked = asyncio.Event(), []

    async def look(seen: Hashable) -> ServiceState:
        looked.append(1)
        await may_answer.wait()
        return STATE

    view = LiveView(lambda: IngressStats("me"), look)
    first, *others = [asyncio.create_task(view.document((True, ""))) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    may_answer.set()
    documents = await asyncio.gather(*others)
    assert len(looked) == 1 and all(document is documents[0] for document in documents)
