"""The same numbers by the names that vLLM gives them, for boards and autoscalers that read these.

Each engine of either pool is one of vLLM's engines, and what clients see is told by each ingress replica; the label
`engine` has the name of the replica. A board that adds up over engines shows the whole service.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from deployments.engine.stats import EngineStats
from deployments.replica_stats import ReplicaStats
from deployments.telemetry.families import Rows, counter, gauge, histogram
from deployments.telemetry.ingress_stats import IngressStats

VLLM_PREFIX = "vllm:"

_LABELS = ("model_name", "engine")
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("ttft_s", "Arrival to first token sent."),
    "inter_token_latency_seconds": ("itl_s", "Gap between consecutive tokens."),
    "e2e_request_latency_seconds": ("call_s", "Arrival to the end of a call that ended well."),
    "request_prompt_tokens": ("prompt_tokens", "Prompt tokens of a call that ended well."),
    "request_generation_tokens": ("generated_tokens", "Tokens generated for a call that ended well."),
}


class VllmCollector(Collector):
    """See the module.

    Args:
        model: its name in the API.
        pools: the replicas of each pool, by its name.
        ingresses: replicas of the ingress.
    """

    def __init__(
        self, model: str, pools: Mapping[str, Sequence[ReplicaStats]], ingresses: Sequence[IngressStats]
    ) -> None:
        self._engines = [((model, one.replica), one.engine) for replicas in pools.values() for one in replicas]
        self._clients = [((model, one.replica), one.clients) for one in ingresses]

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Sequences in the batch.", lambda e: e.num_running)
        yield self._gauge(
            "num_requests_waiting",
            "Sequences that wait for blocks, or for KV.",
            lambda e: e.num_waiting + e.num_reserved,
        )
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", _kv_usage)
        yield self._counter("prompt_tokens", "Prompt tokens, computed or found in the cache.", _prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", lambda e: e.generated_tokens)
        yield self._counter("num_preemptions", "Sequences that lost their blocks.", lambda e: e.preemptions)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", _prompt_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens found there.", lambda e: e.prefix_hit_tokens)
        yield counter(
            "request_success",
            "Samples of calls that ended well.",
            (*_LABELS, "finished_reason"),
            [((*of, reason), count) for of, c in self._clients for reason, count in sorted(c.finish_reasons.items())],
            VLLM_PREFIX,
        )
        for name, (attribute, text) in _HISTOGRAMS.items():
            rows = [(of, getattr(clients, attribute)) for of, clients in self._clients]
            yield histogram(name, text, _LABELS, rows, VLLM_PREFIX)

    def _gauge(self, name: str, text: str, read: Callable[[EngineStats], float]) -> Metric:
        return gauge(name, text, _LABELS, self._rows(read), VLLM_PREFIX)

    def _counter(self, name: str, text: str, read: Callable[[EngineStats], float]) -> Metric:
        return counter(name, text, _LABELS, self._rows(read), VLLM_PREFIX)

    def _rows(self, read: Callable[[EngineStats], float]) -> Rows:
        return [(of, read(engine)) for of, engine in self._engines]


def _kv_usage(engine: EngineStats) -> float:
    return engine.num_used_blocks / engine.num_blocks if engine.num_blocks else 0.0


def _prompt_tokens(engine: EngineStats) -> float:
    return engine.prompt_tokens + engine.prefix_hit_tokens
