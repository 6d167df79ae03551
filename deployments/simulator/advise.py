"""How many GPUs of which kind a trace needs: the cheapest fixed pools that keep the bounds, found by playing them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deployments.simulator.pools import PoolSetup
from deployments.simulator.requests import Request
from deployments.simulator.result import Result, play
from deployments.simulator.scaling import Fixed
from deployments.simulator.service import Setup


@dataclass(frozen=True, slots=True)
class Fleet:
    """Fixed pools, and what came of them.

    Attributes:
        prefill: replicas; 0: colocated.
        decode: replicas.
        result: of the trace.
    """

    prefill: int
    decode: int
    result: Result


def play_fixed(trace: Sequence[Request], setup: Setup, prefill: int, decode: int) -> Fleet:
    """Play a trace to so many replicas; with none for prefill, colocated."""

    def fixed(pool: PoolSetup, count: int) -> PoolSetup:
        return replace(pool, initial=count, most=max(count, pool.most))

    pool = None if setup.prefill is None or not prefill else fixed(setup.prefill, prefill)
    own = replace(setup, decode=fixed(setup.decode, decode), prefill=pool)
    return Fleet(prefill, decode, play(trace, own, Fixed()))


def best_split(trace: Sequence[Request], setup: Setup, total: int, guess: float) -> Fleet:
    """The split of so many replicas that serves most requests well, climbing from a guess of prefill's share."""
    played: dict[int, Fleet] = {}

    def good(prefill: int) -> int:
        if not 1 <= prefill < total:
            return -1
        if prefill not in played:
            played[prefill] = play_fixed(trace, setup, prefill, total - prefill)
        return played[prefill].result.num_good

    at = min(total - 1, max(1, round(total * guess)))
    while (best := max((at, at - 1, at + 1), key=good)) != at:
        at = best
    return played[at]


def fewest(
    trace: Sequence[Request], setup: Setup, attainment: float, first: int, say: Callable[[Fleet], None]
) -> Fleet | None:
    """The smallest fixed pools of which so great a share of the requests keeps the bounds; None: not with all allowed.

    Args:
        trace: the requests.
        setup: of the service; its pools' `most` bound the search.
        attainment: the share.
        first: replicas that are tried first.
        say: told of each fleet that is looked at.
    """
    total, share, last = max(2, first), 0.4, None
    limit = setup.decode.most + (setup.prefill.most if setup.prefill is not None else 0)
    tried: set[int] = set()
    while 2 <= total <= limit and total not in tried:
        tried.add(total)
        fleet = best_split(trace, setup, total, share)
        say(fleet)
        share = fleet.prefill / total
        is_enough = fleet.result.attainment >= attainment
        if is_enough:
            last = fleet
        # Far below, faster: what is asked for beyond what there is does not wait.
        step = max(1, math.ceil(total * (attainment - fleet.result.attainment) / 2))
        total = total - 1 if is_enough else total + step
    return last
