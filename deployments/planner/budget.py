"""Shares out a budget that does not pay for what both pools need. Pure functions.

Each pool gets the same part of its need, as nearly as whole replicas allow: a prompt that is computed in time is worth
nothing if it then waits for a seat. What is left over is spent at once. A replica is taken from one pool for the other
only once that would have been better for as long as a replica is held: what waits changes from second to second, and
with it what is needed, while a replica that makes room for another serves nobody until that one has started.
"""

import math
from dataclasses import dataclass

# The budget is shared out anew only where the pool that is worse off would have this much more of its need.
_BETTER = 1 / 0.85


@dataclass(frozen=True, slots=True)
class Claim:
    """What one pool asks of the budget.

    Attributes:
        count: replicas that it would have, were it alone.
        least: that it has in any case.
        target: that it has or is getting.
        wanted: that it needs: not whole.
        cost: of one.
        hold_s: for which one is kept that is not needed.
    """

    count: int
    least: int
    target: int
    wanted: float
    cost: float
    hold_s: float

    def part(self, count: int) -> float:
        """Of its need, with so many."""
        return count / self.wanted if self.wanted > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Lean:
    """The budget would be shared out otherwise.

    Attributes:
        to_prefill: prefill would have more and decode fewer; else the other way round.
        since_s: when that began.
    """

    to_prefill: bool
    since_s: float


def affordable(claim: Claim, budget: float) -> int:
    """What the only pool gets; the least that it may have in any case."""
    return max(claim.least, min(claim.count, _whole(budget / claim.cost, claim.count)))


def share(
    decode: Claim, prefill: Claim, budget: float, lean: Lean | None, at_s: float
) -> tuple[tuple[int, int], Lean | None]:
    """What both pools get, decode's first, and what is to be remembered.

    Args:
        decode: its claim.
        prefill: likewise.
        budget: what both may cost.
        lean: what was remembered.
        at_s: the time.
    """
    if decode.count * decode.cost + prefill.count * prefill.cost <= budget + 1e-9:
        return (decode.count, prefill.count), None

    def parts(split: tuple[int, int]) -> tuple[float, float]:
        both = decode.part(split[0]), prefill.part(split[1])
        return min(both), max(both)

    splits = _splits(decode, prefill, budget)
    best = max(splits, key=parts)
    kept = min(decode.target, decode.count), min(prefill.target, prefill.count)
    within_reach = [split for split in splits if split[0] >= kept[0] and split[1] >= kept[1]]
    if not within_reach:
        return best, None  # they have more than the budget pays for
    stay = max(within_reach, key=parts)
    if parts(best)[0] <= _BETTER * parts(stay)[0]:
        return stay, None
    to_prefill = best[1] > stay[1]
    since_s = lean.since_s if lean is not None and lean.to_prefill == to_prefill else at_s
    if at_s - since_s < (decode if to_prefill else prefill).hold_s:
        return stay, Lean(to_prefill, since_s)
    return best, None


def _splits(decode: Claim, prefill: Claim, budget: float) -> list[tuple[int, int]]:
    """Of which each spends all that it can."""
    splits = [(decode.least, prefill.least)]
    for num_prefill in range(prefill.least, prefill.count + 1):
        num_decode = _whole((budget - num_prefill * prefill.cost) / decode.cost, decode.count)
        if num_decode >= decode.least:
            splits.append((num_decode, num_prefill))
    return splits


def _whole(replicas: float, most: int) -> int:
    return most if replicas >= most else math.floor(replicas + 1e-9)
