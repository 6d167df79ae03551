"""Metrics of a running service are those that the page describes and the board shows, and as clients measure them."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable

import httpx
import psutil
import pytest
import ray
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from deployments.engine.stats import LATENCY_BUCKETS_S
from deployments.serve_state import ask_each
from deployments.telemetry.ingress_stats import IngressStats
from tests.docs.metric_tables import Described, described_metrics
from tests.docs.pages import ROOT
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL_NAME, Service
from tests.e2e.processes import engine_of, title_of
from tests.waiting import stop_process, wait_until

BOARD = ROOT / "app" / "grafana" / "kvrelay.json"
# Of names, and the unit that must be said of them.
UNITS = {"seconds": "seconds", "bytes": "bytes", "tokens": "tokens"}


def families_of(service: Service) -> dict[str, Metric]:
    """By the names that the page has: those of counters with `_total`."""
    families = text_string_to_metric_families(service.metrics())
    return {f"{family.name}_total" if family.type == "counter" else family.name: family for family in families}


def labels_of(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels if label != "le"}


def test_the_page_of_metrics_and_a_running_service_name_the_same_ones(disaggregated: Service) -> None:
    running, described = families_of(disaggregated), {metric.name: metric for metric in described_metrics()}
    assert running.keys() == described.keys()
    for name, family in running.items():
        metric = described[name]
        assert family.type == metric.type, name
        assert not family.samples or labels_of(family) == set(metric.labels), name


@pytest.mark.parametrize("metric", described_metrics(), ids=lambda metric: metric.name)
def test_a_name_says_its_unit(metric: Described) -> None:
    words = metric.name.removesuffix("_total").split("_")
    said = [unit for word, unit in UNITS.items() if words[-1] == word]
    assert said in ([], [metric.unit])
    assert metric.unit not in ("seconds", "bytes") or metric.unit in words
    assert (metric.type == "counter") == metric.name.endswith("_total")


def board_queries() -> list[str]:
    board = json.loads(BOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def sample_names(families: Iterable[Metric]) -> dict[str, set[str]]:
    """Of all series, with their labels."""
    names: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def test_the_board_shows_what_a_running_service_has(disaggregated: Service) -> None:
    described = {metric.name: {*metric.labels} for metric in described_metrics()}
    named = sample_names(families_of(disaggregated).values())
    queries = board_queries()
    assert len(queries) > 40
    for query in queries:
        for name in re.findall(r"\$\{prefix\}_(\w+)", query):
            family = re.sub(r"_bucket$", "", f"kvrelay_{name}")
            assert family in described, query
            # What nobody has done yet, as to refuse a key, has no series.
            labels = named.get(f"kvrelay_{name}", described[family])
            for group in re.findall(r"by \(([^)]*)\)", query):
                assert {label.strip() for label in group.split(",")} <= labels, query


def test_an_ingress_replica_answers_another_that_asks_all(disaggregated: Service) -> None:
    answers = asyncio.run(ask_each(disaggregated.pool("Ingress"), "ingress_stats", ANSWER_TIMEOUT_S))
    (told,) = answers
    assert isinstance(told, IngressStats)
    assert [sample.labels for sample in families_of(disaggregated)["kvrelay_readings_total"].samples] == [
        {"ingress": told.replica}
    ]


def agent_page() -> dict[str, Metric]:
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    answer = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=ANSWER_TIMEOUT_S)
    return {family.name: family for family in text_string_to_metric_families(answer.raise_for_status().text)}


def total(family: Metric | None, **labels: str) -> float:
    """Of all its samples with such labels."""
    samples = [] if family is None else family.samples
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_rays_agent_has_the_same_numbers(disaggregated: Service, client: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": list(range(7000, 7100)), "max_tokens": 4}
    client.post(f"{disaggregated.url}/v1/completions", json=body).raise_for_status()

    def are_told() -> bool:
        ours, agent = families_of(disaggregated), agent_page()
        (ingress,) = {sample.labels["ingress"] for sample in ours["kvrelay_requests_total"].samples}
        replicas = {sample.labels["replica"] for sample in ours["kvrelay_kv_blocks"].samples}
        agrees = [
            total(agent.get("ray_kvrelay_requests"), ingress=ingress, outcome="ok")
            == total(ours["kvrelay_requests_total"], outcome="ok"),
            total(agent.get("ray_kvrelay_ttft_seconds_bucket"), ingress=ingress, le="+Inf")
            == sum(s.value for s in ours["kvrelay_ttft_seconds"].samples if s.name.endswith("_count")),
        ]
        for name in ("kvrelay_generated_tokens", "vllm_prompt_tokens"):
            label, own = ("replica", name) if name.startswith("kvrelay") else ("engine", "vllm:prompt_tokens")
            told = sum(total(agent.get(f"ray_{name}"), **{label: replica}) for replica in replicas)
            agrees.append(told == total(ours[f"{own}_total"]))
        return all(agrees)

    wait_until(are_told, ANSWER_TIMEOUT_S)
    agent = agent_page()
    ours, told = sample_names(families_of(disaggregated).values()), sample_names(agent.values())
    here_alone = {"kvrelay_ingress_replicas"}
    assert {f"ray_{name.replace(':', '_')}" for name in ours.keys() - here_alone} <= told.keys()
    assert agent["ray_kvrelay_requests"].type == "counter"
    # What has not happened yet is 0 there, so that the first time is an increase.
    counters = [family for family in families_of(disaggregated).values() if family.type == "counter" and family.samples]
    assert {f"ray_{family.name}".replace(":", "_") for family in counters} <= agent.keys()
    assert agent["ray_kvrelay_kv_blocks"].type == "gauge"


def test_the_histogram_of_first_tokens_agrees_with_a_client_within_a_bucket(
    service: Service, client: httpx.Client
) -> None:
    def buckets() -> list[int]:
        """The bucket of each observation, in order."""
        (family,) = [f for f in families_of(service).values() if f.name == "kvrelay_ttft_seconds"]
        upto = [int(sample.value) for sample in family.samples if sample.name.endswith("_bucket")]
        counts = [now - before for now, before in zip(upto, [0, *upto], strict=False)]
        return [index for index, count in enumerate(counts) for _ in range(count)]

    # That which computes prompts. To stop it costs nothing; prompts that take it as long are a minute of a core.
    name = f"ServeReplica:{service.mode}:{service.pools[0]}"
    (front,) = [process for process in psutil.Process().children(recursive=True) if name in title_of(process)]
    engine = engine_of(front)

    def measure(wait_s: float, start: int) -> float:
        """The time to the first token of a prompt whose engine is stopped for so long once it is asked."""
        body = {"model": MODEL_NAME, "prompt": list(range(start, start + 70)), "max_tokens": 3, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}  # each token is an event, whatever its text
        stop_process(engine.pid)
        begun_s = time.perf_counter()
        going_on = threading.Timer(wait_s, os.kill, (engine.pid, signal.SIGCONT))
        going_on.start()
        try:
            with client.stream("POST", f"{service.url}/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(line for line in lines if line.startswith("data: "))
                seconds = time.perf_counter() - begun_s
                assert "data: [DONE]" in lines
        finally:
            going_on.join()
        assert seconds > wait_s, "its engine was stopped"
        return seconds

    before = buckets()
    # So long that the milliseconds in which a busy machine does other things are few beside them.
    seen = sorted(measure(wait_s, 8000 + 100 * n) for n, wait_s in enumerate((0.2, 0.4, 0.7, 1.0, 1.5) * 2))
    after = buckets()
    for index in before:
        after.remove(index)
    expected = [bisect_left(LATENCY_BUCKETS_S, seconds) for seconds in seen]
    assert len(after) == len(expected)
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(after, expected, strict=True)), (after, expected)
