"""vLLM's names have our numbers: for each engine those of that engine, for each ingress replica what clients see."""

from prometheus_client.parser import text_string_to_metric_families

from deployments.engine.stats import EngineStats
from deployments.replica_stats import HandoffStats, ReplicaStats
from deployments.telemetry.client_stats import ClientCounts
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.metrics import render
from deployments.telemetry.peers import IngressReading
from tests.telemetry.calls import CALL


def test_the_numbers_of_engines_and_clients_bear_vllms_names() -> None:
    engine = EngineStats(
        num_running=3, num_waiting=2, num_reserved=4, num_blocks=100, num_used_blocks=25, prompt_tokens=70,
        prefix_hit_tokens=30, generated_tokens=9, preemptions=1,
    )  # fmt: skip
    counts = ClientCounts()
    counts.first_token(0.3)
    counts.call_ended(CALL)
    pools = {"decode": [ReplicaStats("d0", engine, HandoffStats())]}
    page = render(pools, IngressReading([IngressStats("i0", counts.stats)]), "m").decode()
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name.startswith("vllm:")
        and sample.labels["model_name"] == "m"
        and sample.labels["engine"] in ("d0", "i0")
        and sample.labels.get("finished_reason") in (None, "length")
    }
    assert found.items() >= {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 6,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 100,
        "vllm:generation_tokens_total": 9,
        "vllm:num_preemptions_total": 1,
        "vllm:prefix_cache_queries_total": 100,
        "vllm:prefix_cache_hits_total": 30,
        "vllm:request_success_total": 1,
        "vllm:time_to_first_token_seconds_sum": 0.3,
        "vllm:e2e_request_latency_seconds_sum": 1.5,
        "vllm:request_prompt_tokens_sum": 12,
        "vllm:request_generation_tokens_sum": 3,
    }.items()  # fmt: skip


def test_without_the_setting_no_name_is_vllms() -> None:
    assert b"vllm" not in render({}, IngressReading([IngressStats("i0")]))
