"""How many GPUs of which kind a trace needs: the cheapest fixed pools that keep the bounds, found by playing them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deployments.simulator.curves import Curves
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
        kinds: names of what its prefill and its decode replicas run on.
    """

    prefill: int
    decode: int
    result: Result
    kinds: tuple[str, str] = ("", "")

    @property
    def name(self) -> str:
        """For people."""
        prefill, decode = (f" on {kind}" if kind else "" for kind in self.kinds)
        if not self.prefill:
            return f"{self.decode} colocated{decode}"
        return f"{self.prefill} prefill{prefill}, {self.decode} decode{decode}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of GPU.

    Attributes:
        name: for people.
        curves: of an engine on it.
        cost: of an hour.
    """

    name: str
    curves: Curves
    cost: float


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


def fewest_colocated(
    trace: Sequence[Request], setup: Setup, attainment: float, say: Callable[[Fleet], None]
) -> Fleet | None:
    """The fewest replicas that do both, found by doubling and halving; None: not with all allowed."""
    low, high, most, best = 0, 2, setup.decode.most, None  # `low` is too few; few replicas are soon played
    while low + 1 < high or best is None:
        middle = min(high, most) if best is None else (low + high) // 2
        fleet = play_fixed(trace, setup, 0, middle)
        say(fleet)
        if fleet.result.attainment >= attainment:
            high, best = middle, fleet
        elif middle == most:
            return None
        else:
            low = middle
            if best is None:
                high = 2 * middle
    return best


def cheaper(
    trace: Sequence[Request], setup: Setup, attainment: float, fleet: Fleet, say: Callable[[Fleet], None]
) -> Fleet:
    """The cheapest fleet that is reached from one by replicas that go, or change pools, and still keeps the bounds."""
    assert setup.prefill is not None
    costs = setup.prefill.cost, setup.decode.cost
    tried = {(fleet.prefill, fleet.decode)}

    def cost(pools: tuple[int, int]) -> float:
        return pools[0] * costs[0] + pools[1] * costs[1]

    while True:
        now = fleet.prefill, fleet.decode
        near = [(now[0] + p, now[1] + d) for p, d in ((-1, 0), (0, -1), (-1, 1), (1, -1), (-1, 2), (2, -1))]
        near = [pools for pools in near if min(pools) >= 1 and pools not in tried and cost(pools) < cost(now)]
        if not near:
            return fleet
        pools = min(near, key=cost)
        tried.add(pools)
        other = play_fixed(trace, setup, *pools)
        say(other)
        if other.result.attainment >= attainment:
            fleet = other


def cheapest(
    trace: Sequence[Request], setup: Setup, attainment: float, kinds: Sequence[Kind], say: Callable[[Fleet], None]
) -> list[Fleet]:
    """The cheapest fixed pools that keep the bounds, for each kind of GPU in either pool, and colocated on each.

    Args:
        trace: the requests.
        setup: of the service; its pools' curves and costs are those of the kinds.
        attainment: share of the requests that keep the bounds.
        kinds: to choose from.
        say: told of each fleet that is looked at.

    Returns:
        Those that keep them, the cheapest first.
    """
    assert setup.prefill is not None
    found: list[Fleet] = []
    for of_prefill in kinds:
        for of_decode in kinds:
            names = of_prefill.name, of_decode.name
            own = replace(setup, prefill=_on(setup.prefill, of_prefill), decode=_on(setup.decode, of_decode))

            def tell(fleet: Fleet, names: tuple[str, str] = names) -> None:
                say(replace(fleet, kinds=names))

            if (fleet := fewest(trace, own, attainment, 4, tell)) is not None:
                found.append(replace(cheaper(trace, own, attainment, fleet, tell), kinds=names))
            if of_prefill is of_decode and (fleet := fewest_colocated(trace, own, attainment, tell)) is not None:
                found.append(replace(fleet, kinds=names))
    return sorted(found, key=lambda fleet: fleet.result.cost)


def fleet_costs(fleet: Fleet, kinds: Sequence[Kind]) -> tuple[float, float]:
    """Of an hour of its prefill and of its decode replicas."""
    costs = {kind.name: kind.cost for kind in kinds}
    return fleet.prefill * costs[fleet.kinds[0]], fleet.decode * costs[fleet.kinds[1]]


def _on(pool: PoolSetup, kind: Kind) -> PoolSetup:
    return replace(pool, curves=kind.curves, cost=kind.cost)
