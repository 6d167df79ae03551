"""Numbers of both pools' replicas in Prometheus' form, as their engines and fronts tell them.

Knows what each number is called; the engines and fronts keep the numbers themselves.
"""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from deployments.replica_stats import ReplicaStats
from deployments.telemetry.families import Rows, counter, gauge, histogram

_LABELS = ("pool", "replica")

_GAUGES = {
    "queued_prompt_tokens": ("num_queued_prompt_tokens", "Prompt tokens that wait to be computed."),
    "waiting_sequences": ("num_waiting", "Sequences without KV blocks."),
    "reserved_sequences": ("num_reserved", "Sequences whose KV is on its way."),
    "running_sequences": ("num_running", "Sequences in the batch."),
    "max_sequences": ("max_num_seqs", "Sequences that can be reserved or running at once."),
    "kv_blocks": ("num_blocks", "KV blocks in the pool."),
    "kv_blocks_used": ("num_used_blocks", "KV blocks held by sequences."),
    "flipped": ("is_flipped", "1: a replica of the decode deployment that computes prompts for others now."),
    "tier_bytes": ("tier_bytes", "KV bytes in the whole shared tier, as this replica was last told."),
    "tier_objects": ("tier_objects", "Objects in the whole shared tier, as this replica was last told."),
    "exported_blocks": ("num_exported_blocks", "KV blocks copied out for a hand-off and not yet released."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "tier_fetched_bytes": ("tier_fetched_bytes", "KV bytes brought from the shared tier."),
    "tier_fetch_seconds": ("tier_fetch_s", "Seconds that this took."),
    "tier_given_bytes": ("tier_given_bytes", "KV bytes given to the shared tier."),
    "tier_failures": ("tier_failures", "Times that the shared tier did not give what it has, or not in time."),
    "tier_evictions": ("tier_evictions", "Objects of the whole shared tier that made room, as it was last told."),
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "preemptions": ("preemptions", "Sequences that lost their blocks and were computed again."),
    "engine_steps": ("steps", "Batches run."),
    "expired_leases": ("expired_leases", "Hand-offs given up, the other engine not being heard of."),
    "prefill_steps": ("prefill_steps", "Batches with prompt tokens in them."),
    "prefill_seconds": ("prefill_s", "Seconds of batches with prompt tokens in them."),
    "prefill_step_gaps": ("prefill_gaps", "Gaps between tokens that ended with a batch with prompt tokens in it."),
    "prefill_step_gap_seconds": ("prefill_gap_s", "Seconds of these gaps."),
    "finished_sequences": ("finished", "Sequences that ended after they had blocks."),
}
_HISTOGRAMS = {
    "engine_ttft_seconds": ("ttft_s", "Arrival at the engine to first token."),
    "engine_itl_seconds": ("itl_s", "Gap between consecutive tokens of a sequence at the engine."),
    "drafted_tokens": ("drafted_tokens", "Drafts that one sequence tried in one step; none are not counted."),
    "accepted_drafts": ("accepted_tokens", "How many of these were right."),
}
_HANDOFF_COUNTERS = {
    "handoff_requests": ("num_requests", "Prompts handed over whole."),
    "handoff_failures": ("num_failures", "Hand-offs that failed."),
    "handoff_chunks": ("num_chunks", "KV chunks handed over."),
    "handoff_bytes": ("num_bytes", "KV bytes handed over."),
    "handoff_hidden_seconds": ("hidden_s", "Seconds in which KV was on its way while its prompt was still computed."),
    "handoff_exposed_seconds": ("exposed_s", "Seconds from a prompt's end until all of its KV had arrived."),
}


class PoolCollector(Collector):
    """Turns one reading of replicas into metric families.

    Args:
        pools: the replicas of each pool, by its name.
    """

    def __init__(self, pools: Mapping[str, Sequence[ReplicaStats]]) -> None:
        self._rows = [((pool, stats.replica), stats) for pool, replicas in pools.items() for stats in replicas]

    def collect(self) -> Iterator[Metric]:
        for name, (attribute, text) in _GAUGES.items():
            yield gauge(name, text, _LABELS, self._of_engines(attribute))
        for name, (attribute, text) in _COUNTERS.items():
            yield counter(name, text, _LABELS, self._of_engines(attribute))
        yield counter(
            "prompt_tokens_by_origin",
            "Prompt tokens by where their KV came from: this engine's cache, that of a prefill engine (delta), the"
            " shared tier, or nowhere (miss: computed here).",
            (*_LABELS, "origin"),
            self._origins(),
        )
        yield counter(
            "prompts",
            "Prompts by where they were computed: by a prefill engine, by a decode engine, or found there (cached).",
            (*_LABELS, "where"),
            [((*of, where), count) for of, stats in self._rows for where, count in sorted(stats.prompts.items())],
        )
        for name, (attribute, text) in _HISTOGRAMS.items():
            yield histogram(name, text, _LABELS, [(of, getattr(stats.engine, attribute)) for of, stats in self._rows])
        for name, (attribute, text) in _HANDOFF_COUNTERS.items():
            yield counter(name, text, _LABELS, [(of, getattr(stats.handoff, attribute)) for of, stats in self._rows])
        yield histogram(
            "handoff_seconds",
            "Per chunk, from computed to arrived in the other pool.",
            _LABELS,
            [(of, stats.handoff.seconds) for of, stats in self._rows],
        )

    def _of_engines(self, attribute: str) -> Rows:
        for of, stats in self._rows:
            yield of, getattr(stats.engine, attribute)

    def _origins(self) -> Rows:
        for of, stats in self._rows:
            engine = stats.engine
            yield (*of, "engine"), engine.prefix_hit_tokens - engine.tier_hit_tokens
            yield (*of, "delta"), engine.delta_hit_tokens
            yield (*of, "tier"), engine.tier_hit_tokens
            yield (*of, "miss"), engine.prompt_tokens
