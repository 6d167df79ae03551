"""What requests cost at decode replicas, learned from what both pools say of themselves, one reading after the other.

Owns what a prompt token takes in a decode engine's own steps, what it takes to bring some from a prefill engine, what
steps without prompts take, how many gaps between tokens are late, and how much a request generates. Pure: no clock.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from deployments.engine.stats import EngineStats, Histogram
from deployments.load.decode_steps import decode_steps_between
from deployments.load.outlook import PoolReadings
from deployments.load.step_cost import StepCost
from deployments.replica_stats import HandoffStats
from deployments.routing.crossover import Gaps, There
from deployments.routing.scoring import Costs

_STEP_HALF_LIFE_S = 10.0
_OUTPUT_HALF_LIFE = 32.0  # finished sequences
# Busy seconds of hand-offs after which one counts half; and seconds without any after which what they took counts half:
# what was slow once is tried again.
_HANDOFF_HALF_LIFE_S = 5.0
_HANDOFF_PATIENCE_S = 120.0
_LATE_HALF_LIFE_S = 5.0
_TIER_HALF_LIFE = 32_768.0  # tokens
# Stands for the cost of a prompt token until one was measured. Where nothing else is known all costs are in proportion
# to it, so that it changes no choice.
UNMEASURED_TOKEN_S = 1e-4
# To bring the KV of a token, as a part of what it takes to compute, until it was measured.
_UNMEASURED_HANDOFF = 0.05
# A seat is taken to be held for so long until a sequence was seen to leave one.
_UNMEASURED_SEAT_S = 1.0


class Mean:
    """A mean of the recent past.

    Args:
        half_life: count after which what was added before counts half.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._total = self._count = self._early = 0.0

    def add(self, total: float, count: float) -> None:
        """So much, over so many more. Without any of them it counts with the next: an answer takes many readings."""
        if total < 0 or count < 0:
            return
        self._early += total
        if count > 0:
            keep = 0.5 ** (count / self._half_life)
            self._total, self._count = keep * self._total + self._early, keep * self._count + count
            self._early = 0.0

    @property
    def value(self) -> float | None:
        """None: nothing was added."""
        return self._total / self._count if self._count else None


class TierCost:
    """What it takes to bring a token from the shared tier, which is the same for both pools."""

    def __init__(self) -> None:
        self._token_s = Mean(_TIER_HALF_LIFE)
        self._engines: dict[str, EngineStats] = {}

    @property
    def token_s(self) -> float | None:
        """None: none was brought yet."""
        return self._token_s.value

    def update(self, engines: Mapping[str, EngineStats]) -> None:
        """Take a reading of all replicas, by their names."""
        for name, now in engines.items():
            before = self._engines.get(name, EngineStats())
            self._token_s.add(now.tier_fetch_s - before.tier_fetch_s, now.tier_hit_tokens - before.tier_hit_tokens)
        self._engines = dict(engines)


class DecodeCosts:
    """See the module.

    Args:
        itl_s: gaps are late that are longer.
    """

    def __init__(self, itl_s: float = math.inf) -> None:
        self._itl_s = itl_s
        self._readings = PoolReadings(counts_hits=False)
        self._engines: dict[str, EngineStats] = {}
        self._handoffs: dict[str, HandoffStats] = {}
        self._steps = StepCost(_STEP_HALF_LIFE_S)
        self._output = Mean(_OUTPUT_HALF_LIFE)
        self._handoff = StepCost(_HANDOFF_HALF_LIFE_S)
        self._handoff_tokens = Mean(_OUTPUT_HALF_LIFE)
        self._handoff_trust = 1.0
        self._late_share = 0.0
        self._as_of_s = -math.inf
        self._gaps = Gaps(0.0)
        self._bringing: There | None = None  # a prompt that is computed; None: none was brought yet

    def update(
        self, engines: Mapping[str, EngineStats], handoffs: Mapping[str, HandoffStats], block_size: int, as_of_s: float
    ) -> None:
        """Take a reading.

        Args:
            engines: of each decode replica, by its name.
            handoffs: of each prefill replica, likewise.
            block_size: tokens per block.
            as_of_s: what they say was true then or later.
        """
        self._readings.update(engines, as_of_s)
        self._learn_steps(engines)
        elapsed_s = max(0.0, as_of_s - self._as_of_s) if self._as_of_s > -math.inf else 0.0
        self._learn_handoffs(handoffs, block_size, elapsed_s)
        self._learn_gaps(engines, elapsed_s)
        self._engines, self._handoffs, self._as_of_s = dict(engines), dict(handoffs), as_of_s
        self._sum_up()

    def _learn_steps(self, engines: Mapping[str, EngineStats]) -> None:
        for name, now in engines.items():
            before = self._engines.get(name, EngineStats())
            if (steps := decode_steps_between(now, before)) is not None:
                self._steps.add(steps.steps, steps.sequences, steps.seconds)
            self._output.add(now.generated_tokens - before.generated_tokens, now.finished - before.finished)

    def _learn_handoffs(self, handoffs: Mapping[str, HandoffStats], block_size: int, elapsed_s: float) -> None:
        self._handoff_trust *= 0.5 ** (elapsed_s / _HANDOFF_PATIENCE_S)
        for name, handoff in handoffs.items():
            old = self._handoffs.get(name, HandoffStats())
            num_chunks = handoff.num_chunks - old.num_chunks
            num_tokens = (handoff.num_blocks - old.num_blocks) * block_size
            self._handoff.add(num_chunks, num_tokens, handoff.seconds.total - old.seconds.total)
            self._handoff_tokens.add(num_tokens, num_chunks)
            if num_chunks > 0:
                self._handoff_trust = 1.0

    def _learn_gaps(self, engines: Mapping[str, EngineStats], elapsed_s: float) -> None:
        before = [(now.itl_s, self._engines.get(name, EngineStats()).itl_s) for name, now in engines.items()]
        num_gaps = sum(sum(now.counts) - sum(old.counts) for now, old in before)
        if num_gaps > 0:
            late = sum(_num_above(now, self._itl_s) - _num_above(old, self._itl_s) for now, old in before)
            keep = 0.5 ** (elapsed_s / _LATE_HALF_LIFE_S)
            self._late_share = keep * self._late_share + (1 - keep) * max(0.0, late) / num_gaps

    def costs(self, elsewhere_s: float | None) -> Costs:
        """Of the decode pool.

        Args:
            elsewhere_s: what a prompt token takes in the prefill pool. It is taken to take as long here until what was
                measured contradicts that: decode engines compute few prompts and short ones, and one step that was held
                up must not send conversations away from their KV. None: there is no such pool.
        """
        tokens = self._readings.tokens_per_step
        measured = self._readings.cost.seconds(1.0, tokens)
        token_s = measured.best / tokens or UNMEASURED_TOKEN_S
        if elsewhere_s is not None and measured.low <= elsewhere_s * tokens <= measured.high:
            token_s = elsewhere_s
        # As much as is sure, for batches that were all of one size tell nothing; but no less than a prompt token, which
        # is as much to compute: 0.026 ms of a step of 128 sequences, 0.025 ms of a prompt (Llama-3.1-8B, one H100,
        # docs/measured.md).
        sequence_s = max(token_s, self._steps.seconds(0.0, 1.0).low)
        held = self._readings.held
        return Costs(token_s, sequence_s, held.best if held else _UNMEASURED_SEAT_S)

    def there(self, computing_s: float, token_s: float) -> There:
        """What it takes to have a prompt computed in so many seconds, each token in so many, and brought here."""
        if self._bringing is None:
            return There(computing_s, 0.0, token_s * _UNMEASURED_HANDOFF)
        return self._bringing.taking(computing_s)

    def gaps(self, max_tokens: int) -> Gaps:
        """Between tokens, where a request may generate so many."""
        if self._output.value:
            return self._gaps
        return replace(self._gaps, num_new_tokens=max_tokens)

    def _sum_up(self) -> None:
        """Now, and not with every request that asks."""
        step = self._steps.seconds(1.0, 0.0).best, self._steps.seconds(0.0, 1.0).best
        self._gaps = Gaps(self._output.value or 0.0, *step, self._late_share)
        tokens, self._bringing = self._handoff_tokens.value, None
        if tokens is not None and (usual := self._handoff.seconds(1.0, tokens)).best:
            once, per_token = self._handoff.seconds(1.0, 0.0).best, self._handoff.seconds(0.0, 1.0).best
            self._bringing = There(0.0, once, per_token, self._handoff_trust * usual.low / usual.best)

    def num_new_tokens(self, max_tokens: int) -> int:
        """That a request is expected to generate, which may generate so many."""
        mean = self._output.value
        return max_tokens if mean is None else min(max_tokens, round(mean))


def _num_above(gaps: Histogram, bound_s: float) -> float:
    """Of those counted, that are longer; within a bucket they are taken to be spread evenly."""
    lower, above = 0.0, float(gaps.counts[-1])
    for upper, count in zip(gaps.bounds, gaps.counts, strict=False):
        above += count * min(1.0, max(0.0, (upper - bound_s) / (upper - lower)))
        lower = upper
    return above if bound_s < math.inf else 0.0
