"""Plays a trace to modelled engines in virtual time, by one way to choose an engine."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.router.engines import ModelledEngine, Speed
from tests.bench.router.policies import Policy
from tests.bench.router.trace import Arrival


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a replay.

    Attributes:
        found_tokens: that engines had cached.
        computed_tokens: by engine.
        ttft_s: of each prompt: until it was computed.
    """

    found_tokens: int
    computed_tokens: tuple[int, ...]
    ttft_s: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """Most computed tokens of an engine over the mean."""
        return max(self.computed_tokens) * len(self.computed_tokens) / sum(self.computed_tokens)

    def ttft(self, share: float) -> float:
        """Seconds that so great a share of the prompts did not exceed."""
        ordered = sorted(self.ttft_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def replay(
    arrivals: Sequence[Arrival], policy: Policy, num_engines: int, num_blocks: int, speed: Speed, period_s: float = 1.0
) -> Result:
    """Play it.

    Args:
        arrivals: in order.
        policy: chooses engines.
        num_engines: of the pool.
        num_blocks: of each.
        speed: of each.
        period_s: between two readings of the engines.
    """
    engines = [ModelledEngine(num_blocks, speed) for _ in range(num_engines)]
    ends: list[tuple[float, int]] = []
    ttft_s = [0.0] * len(arrivals)
    next_tick_s = arrivals[0].at_s
    policy.tick(engines, next_tick_s)

    def start(index: int, now_s: float) -> None:
        if (end_s := engines[index].start(now_s)) is not None:
            heapq.heappush(ends, (end_s, index))

    def advance(to_s: float) -> None:
        nonlocal next_tick_s
        while True:
            end_s = ends[0][0] if ends else to_s
            if min(end_s, next_tick_s) >= to_s:
                return
            if next_tick_s <= end_s:
                policy.tick(engines, next_tick_s)
                next_tick_s += period_s
                continue
            end_s, index = heapq.heappop(ends)
            number = int(engines[index].finish().request_id)
            ttft_s[number] = end_s - arrivals[number].at_s
            policy.done(number, end_s)
            start(index, end_s)

    for number, arrival in enumerate(arrivals):
        advance(arrival.at_s)
        index = policy.choose(number, arrival, engines, arrival.at_s)
        engines[index].add(str(number), arrival)
        start(index, arrival.at_s)
    while ends:
        advance(ends[0][0] + 1e-9)
    return Result(
        sum(engine.stats.prefix_hit_tokens for engine in engines),
        tuple(engine.stats.prompt_tokens for engine in engines),
        tuple(ttft_s),
    )
