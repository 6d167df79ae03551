"""Numbers an engine keeps of its own work, and the snapshot that leaves it. Knows no metrics system."""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Self

from deployments.engine.config import EngineLimits

# Seconds. From one decode step on a GPU to a long prompt on a CPU. From 5 ms on each is at most 5/3 of the one before:
# a percentile, which lies somewhere in its bucket, is off by less.
LATENCY_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 3.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0),
)
# Drafts of one run: each place for itself, as long as there are few.
DRAFT_BUCKETS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 16.0, 32.0)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket, Prometheus fashion but not yet cumulative; the last count is of what exceeds every bound."""

    bounds: tuple[float, ...] = LATENCY_BUCKETS_S
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> "Histogram":
        return Histogram(self.bounds, list(self.counts), self.total)


@dataclass(slots=True)
class EngineStats:
    """Counters since start and gauges of now.

    Attributes:
        uptime_s: seconds since the engine began; infinite: not known.
        num_queued_prompt_tokens: prompt tokens that wait to be computed.
        num_remote_prompt_tokens: those of them that a prefill engine will compute, unless they are found cached.
        num_waiting: sequences without blocks.
        num_reserved: sequences whose KV is on its way from a prefill engine.
        num_running: sequences in the batch.
        num_drawn_tokens: that these have drawn so far.
        num_allowed_tokens: that all sequences here may draw at most, the drawn ones among them.
        max_num_seqs: sequences that have a seat at once, reserved and running.
        max_num_batched_tokens: tokens of a full step.
        num_blocks: size of the KV pool.
        block_size: tokens per KV block.
        kv_window: tokens of a sequence, the newest, whose KV is kept in groups of layers with a window; 0: none has.
        kv_groups: groups of layers; each takes blocks of its own for a sequence.
        full_kv_groups: of these, the ones that keep all KV.
        num_used_blocks: blocks held by sequences; cached free blocks do not count.
        num_exported_blocks: blocks copied out for a hand-off and not yet released.
        prompt_tokens: prompt tokens computed here, in batches that have ended.
        prefix_hit_tokens: prompt tokens found in the prefix cache.
        delta_hit_tokens: prompt tokens that a prefill engine had cached and this one had not, handed over.
        tier_hit_tokens: those of the prefix hits whose KV the shared tier had brought, each block once.
        tier_fetched_bytes: KV that was brought from the tier.
        tier_fetch_s: seconds that this took.
        tier_given_bytes: KV that was given to the tier.
        tier_failures: times that the tier did not give what it has, or not in time.
        tier_bytes: KV in the whole tier, as this engine was last told.
        tier_objects: that it consists of.
        tier_evictions: of objects that made room for others.
        generated_tokens: tokens drawn here.
        preemptions: sequences that lost their blocks and were computed again.
        steps: batches run.
        expired_leases: hand-offs that were given up since the other engine was not heard of.
        prefill_steps: batches with prompt tokens in them that have ended.
        prefill_s: seconds that these took.
        prefill_gaps: gaps between tokens that ended with one of them.
        prefill_gap_s: seconds of these gaps.
        finished: sequences that gave their seat back for good, whatever ended them.
        num_receivers: ingress replicas that are connected.
        is_flipped: of a decode replica: it computes prompts for others for now, and is given none to decode.
        ttft_s: arrival at this engine to first token.
        itl_s: gap between tokens of one sequence.
        drafted_tokens: of each run with drafts how many it tried.
        accepted_tokens: of each such run how many of them were right.
    """

    uptime_s: float = math.inf
    num_queued_prompt_tokens: int = 0
    num_remote_prompt_tokens: int = 0
    num_waiting: int = 0
    num_reserved: int = 0
    num_running: int = 0
    num_drawn_tokens: int = 0
    num_allowed_tokens: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    num_blocks: int = 0
    block_size: int = 0
    kv_window: int = 0
    kv_groups: int = 1
    full_kv_groups: int = 1
    num_used_blocks: int = 0
    num_exported_blocks: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    delta_hit_tokens: int = 0
    tier_hit_tokens: int = 0
    tier_fetched_bytes: int = 0
    tier_fetch_s: float = 0.0
    tier_given_bytes: int = 0
    tier_failures: int = 0
    tier_bytes: int = 0
    tier_objects: int = 0
    tier_evictions: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    expired_leases: int = 0
    prefill_steps: int = 0
    prefill_s: float = 0.0
    prefill_gaps: int = 0
    prefill_gap_s: float = 0.0
    finished: int = 0
    num_receivers: int = 0
    is_flipped: bool = False
    ttft_s: Histogram = field(default_factory=Histogram)
    itl_s: Histogram = field(default_factory=Histogram)
    drafted_tokens: Histogram = field(default_factory=lambda: Histogram(DRAFT_BUCKETS))
    accepted_tokens: Histogram = field(default_factory=lambda: Histogram(DRAFT_BUCKETS))

    @classmethod
    def begin(cls, limits: EngineLimits) -> Self:
        """Of an engine that has done nothing yet."""
        return cls(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            kv_window=limits.kv_windows[-1] or 0,
            kv_groups=len(limits.kv_windows),
            full_kv_groups=limits.kv_windows.count(None),
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )

    @property
    def num_used_tokens(self) -> float:
        """Whose KV sequences hold: of each group of layers, on the average."""
        return self.num_used_blocks * self.block_size / self.kv_groups

    def copy(self) -> "EngineStats":
        """An independent snapshot."""
        return replace(
            self,
            ttft_s=self.ttft_s.copy(),
            itl_s=self.itl_s.copy(),
            drafted_tokens=self.drafted_tokens.copy(),
            accepted_tokens=self.accepted_tokens.copy(),
        )
