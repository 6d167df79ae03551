"""Decides how many replicas both pools have. A pure function: what it remembers it is given, and gives back.

It follows need up at once and down late. Up: as soon as what comes, or waits, needs more. Down: once even a careful
reading of what comes needed less for a while, the longer the longer a replica takes to start. If one that was removed
is soon needed again, the next is kept for twice as long; so traffic that comes and goes is not followed where following
it is no use. If a bound is not kept although there should be engines enough, they do less than is thought: need is
raised, and the raise wears off.

What the budget does not pay for `budget.py` shares out.
"""

import math
from dataclasses import dataclass, replace

from deployments.planner.budget import Claim, affordable, share
from deployments.planner.flip import Lack, Side, describe, num_flipped
from deployments.planner.need import (
    Need,
    is_behind,
    need_of_answers,
    need_of_prompts,
    unless_decode_can,
    unless_idle,
)
from deployments.planner.observation import Observation, PoolSeen, Tail
from deployments.planner.settings import PlannerSettings
from deployments.planner.state import Bounds, Memory, PoolMemory, remember

# A replica is kept for so many starts after it was needed.
_HOLD_STARTS = 2.0
# And for at most so many times that, where removing was often wrong; the memory of it halves in so long.
_MAX_PATIENCE = 16.0
_PATIENCE_HALF_LIFE_S = 3600.0
# To need a replica so many holds after it was removed is to have removed it too soon.
_REGRET_HOLDS = 2.0
# How much more is planned for when a bound is not kept, at most, and how soon that is forgotten.
_MAX_RAISE, _RAISE_HALF_LIFE_S = 2.0, 900.0
# What was changed shows in the tail after so long.
_TAIL_S = 60.0
# Of those that did not keep a bound, so many are needed to believe it.
_LEAST_SAMPLES = 100.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas of both deployments.

    Attributes:
        decode: so many.
        prefill: so many; 0: there is no such pool.
        reason: in words.
        num_flipped: of decode's, that are to compute prompts for others.
    """

    decode: int
    prefill: int
    reason: str
    num_flipped: int = 0


@dataclass(frozen=True, slots=True)
class _Wish:
    """What one pool would have, were it alone.

    Attributes:
        count: within its bounds.
        free: whatever its bounds are.
        held: so many were needed lately, whatever it has.
    """

    count: int
    free: int
    held: int
    need: Need
    bounds: Bounds
    cost: float
    hold_s: float


def plan(
    seen: Observation, bounds: tuple[Bounds, Bounds | None], settings: PlannerSettings, memory: Memory
) -> tuple[Plan, Memory]:
    """Decide.

    Args:
        seen: both pools.
        bounds: of decode, and of prefill unless colocated.
        settings: what is to be kept.
        memory: what came back the last time.
    """
    decode_bounds, prefill_bounds = bounds
    lent, memory = seen.num_flipped, memory.with_roles(seen.num_flipped)
    may_lack = decode_bounds.least == 0
    decode, decode_memory = _wish_decode(seen, decode_bounds.shifted(-lent), settings, memory.decode, may_lack=may_lack)
    if seen.prefill is None or prefill_bounds is None:
        chosen = affordable(_claim_of_decode(decode), settings.max_cost or math.inf)
        chosen = decode_bounds.by_way_of_one(chosen)
        alone = _settle(decode_memory, decode, chosen, seen.at_s)
        return Plan(chosen, 0, _describe("decode", decode, chosen)), replace(memory, decode=alone)
    own_bounds = prefill_bounds.shifted(lent)
    may_lack = prefill_bounds.least == 0
    prefill, prefill_memory = _wish_prefill(
        seen.prefill, seen.at_s, own_bounds, settings, memory.prefill, may_lack=may_lack
    )
    lent_cost = lent * (settings.decode_cost - settings.prefill_cost)
    claims, budget = (_claim_of_decode(decode), _claim(prefill, prefill.bounds.least)), settings.max_cost or math.inf
    (num_decode, num_prefill), lean = share(*claims, budget - lent_cost, memory.lean, seen.at_s)
    reason = f"{_describe('prefill', prefill, num_prefill)}. {_describe('decode', decode, num_decode)}"
    if (num_decode, num_prefill) != (decode.count, prefill.count):
        reason += f". The budget of {settings.max_cost:g} does not pay for {prefill.count} and {decode.count}"
    settled = Memory(decode_memory, prefill_memory, lent, lean=lean, lent=memory.lent)
    if settings.flip:
        settled = replace(settled, short_since_s=_short_since(seen, prefill, memory))
        settled, flips = _flip(seen, (decode, num_decode), (prefill, num_prefill), prefill_bounds, settled)
        reason += flips
    flipped = settled.num_flipped
    # As many as do the work of each, but what does prefill's may be of the decode deployment.
    more = min(max(0, flipped - lent), max(0, prefill.free - num_prefill))  # than its bounds allow it by itself
    back = max(0, lent - flipped) if num_decode == decode.count else 0  # likewise, and the budget pays for them
    # Of decode those that it does not lend: that they are held is no reason to start others.
    own = max(decode.need.num_engines, decode_bounds.target - flipped)
    working = min(num_decode + back, max(1, decode.free), max(1, own)), num_prefill + more
    num_decode, num_prefill = _deployed(working, flipped, (decode_bounds, prefill_bounds), settings)
    settled = replace(
        settled,
        decode=_settle(decode_memory, decode, num_decode - flipped, seen.at_s, lent - flipped),
        prefill=_settle(prefill_memory, prefill, num_prefill + flipped, seen.at_s, flipped - lent),
    )
    return Plan(num_decode, num_prefill, reason, flipped), settled


def _deployed(
    working: tuple[int, int], flipped: int, bounds: tuple[Bounds, Bounds], settings: PlannerSettings
) -> tuple[int, int]:
    """Replicas of both deployments, decode's first, of which so many do the work of each pool."""
    decode = bounds[0].by_way_of_one(bounds[0].clamp(working[0] + flipped))
    prefill = working[1] - flipped
    if settings.max_cost:  # one that starts in the place of one that goes back may cost more
        prefill = min(
            prefill, math.floor((settings.max_cost - decode * settings.decode_cost) / settings.prefill_cost + 1e-9)
        )
    return decode, bounds[1].by_way_of_one(bounds[1].clamp(prefill))


def _short_since(seen: Observation, prefill: _Wish, memory: Memory) -> float | None:
    assert seen.prefill is not None
    if prefill.held <= seen.prefill.num_ready:
        return None
    return seen.at_s if memory.short_since_s is None else memory.short_since_s


def _flip(
    seen: Observation, decode: tuple[_Wish, int], prefill: tuple[_Wish, int], bounds: Bounds, memory: Memory
) -> tuple[Memory, str]:
    """How many decode replicas compute prompts now, in what is remembered and in words.

    What each pool would have comes with its part of the budget; `bounds` are those of the prefill deployment.
    """
    assert seen.prefill is not None
    (other, num_decode), (own, num_prefill) = decode, prefill
    may_start = bounds.target < bounds.most and num_prefill >= own.count
    lack = Lack(
        0.0 if memory.short_since_s is None else seen.at_s - memory.short_since_s,
        seen.prefill.start_s,
        may_come=may_start or seen.prefill.num_ready < own.bounds.target,
    )
    prompts = Side(seen.prefill.num_ready, own.need.num_engines, own.held)
    needed = other.need.num_engines
    lent = memory.lent.noted(needed, seen.decode.num_ready, seen.at_s)
    answers = Side(seen.decode.num_ready, needed, lent.needed)
    before, num_removable = memory.num_flipped, max(0, other.bounds.target - num_decode)
    count = num_flipped(before, prompts, answers, num_removable, lack)
    lent = lent.after(before, count, seen.at_s, is_called_back=answers.need > answers.ready)
    memory = replace(memory, num_flipped=count, lent=lent)
    return memory, describe(before, count, prompts, answers, lack)


def _wish_decode(
    seen: Observation, bounds: Bounds, settings: PlannerSettings, memory: PoolMemory, *, may_lack: bool
) -> tuple[_Wish, PoolMemory]:
    pool, answers = seen.decode, seen.decode.answers
    assert answers is not None, "decode generates"
    prefill, num_starting = seen.prefill, max(0, bounds.target - pool.num_ready)
    awaits = prefill is not None and prefill.num_ready > 0 and is_behind(prefill.prompts, prefill.num_ready, settings)
    need = need_of_answers(answers, pool, num_starting, settings, awaits_prefill=awaits)
    if may_lack:
        need = unless_idle(need, answers, num_starting, seen.num_flipped)
    return _wish(pool, seen.at_s, need, bounds, settings, settings.decode_cost, memory)


def _wish_prefill(
    pool: PoolSeen, at_s: float, bounds: Bounds, settings: PlannerSettings, memory: PoolMemory, *, may_lack: bool
) -> tuple[_Wish, PoolMemory]:
    need = need_of_prompts(pool.prompts, pool, max(0, bounds.target - pool.num_ready), settings)
    if may_lack:
        need = unless_decode_can(need, pool.prompts)
    return _wish(pool, at_s, need, bounds, settings, settings.prefill_cost, memory)


def _wish(
    pool: PoolSeen,
    at_s: float,
    need: Need,
    bounds: Bounds,
    settings: PlannerSettings,
    cost: float,
    memory: PoolMemory,
) -> tuple[_Wish, PoolMemory]:
    """What one pool would have, and its memory, in which the decision is still missing."""
    memory = _adopt(memory, bounds, at_s)
    memory = _heed_tail(memory, pool, need, bounds, settings, at_s)
    need = need.times(memory.factor)
    hold_s = hold(settings, pool.start_s) * memory.patience
    needs = remember(memory.needs, at_s, max(need.num_engines, need.num_careful), hold_s)
    free, held = max(need.num_engines, min(bounds.target, needs[0][1])), max(need.num_engines, needs[0][1])
    wish = _Wish(bounds.clamp(free), free, held, need, bounds, cost, hold_s)
    return wish, replace(memory, needs=needs)


def hold(settings: PlannerSettings, start_s: float) -> float:
    """How long a replica is kept that is not needed."""
    return max(settings.hold_s, _HOLD_STARTS * start_s)


def _adopt(memory: PoolMemory, bounds: Bounds, at_s: float) -> PoolMemory:
    """What somebody else has set counts as needed now: it is held as if it was."""
    elapsed_s = max(0.0, at_s - memory.at_s) if memory.at_s > -math.inf else 0.0
    patience = 1.0 + (memory.patience - 1.0) * 0.5 ** (elapsed_s / _PATIENCE_HALF_LIFE_S)
    factor = 1.0 + (memory.factor - 1.0) * 0.5 ** (elapsed_s / _RAISE_HALF_LIFE_S)
    needs = memory.needs
    if memory.target != bounds.target:
        needs = remember(needs, at_s, bounds.target, math.inf)
    return replace(memory, patience=patience, factor=factor, needs=needs, at_s=at_s)


def _heed_tail(
    memory: PoolMemory, pool: PoolSeen, need: Need, bounds: Bounds, settings: PlannerSettings, at_s: float
) -> PoolMemory:
    """Raise need where a bound is not kept by engines that should be enough, and that are all there."""
    is_enough = 0 < need.times(memory.factor).num_engines <= bounds.target == pool.num_ready
    is_due = at_s - memory.raised_s > hold(settings, pool.start_s)
    is_due = is_due and at_s - memory.changed_s > _TAIL_S + pool.start_s
    if not (is_enough and is_due and is_missed(pool.tail, settings.quantile)):
        return memory
    one_more = (bounds.target + 0.5) / max(need.lasting, need.burst)
    return replace(memory, factor=min(max(memory.factor, one_more), _MAX_RAISE), raised_s=at_s)


def is_missed(tail: Tail, quantile: float) -> bool:
    """Whether more do not keep a bound than may, and chance does not explain it."""
    allowed = 1.0 - quantile
    if tail.count < _LEAST_SAMPLES:
        return False
    return tail.over > allowed + 3.0 * math.sqrt(allowed * quantile / tail.count)


def _claim(wish: _Wish, least: int) -> Claim:
    wanted = max(wish.need.lasting, wish.need.burst)
    return Claim(wish.count, least, wish.bounds.target, wanted, wish.cost, wish.hold_s)


def _claim_of_decode(wish: _Wish) -> Claim:
    """Of which there is one at least where any is needed: else nothing is served."""
    return _claim(wish, max(wish.bounds.least, min(1, wish.count)))


def _settle(memory: PoolMemory, wish: _Wish, count: int, at_s: float, num_moved: int = 0) -> PoolMemory:
    """Note what was decided; to add what was removed a moment ago teaches patience.

    So many of the other pool do this one's work from now on: those were not added. Where its own deployment is asked
    for fewer instead, nothing was removed either.
    """
    patience, removed_s = memory.patience, memory.removed_s
    num_added = count - wish.bounds.target
    if num_moved > 0:
        num_added = min(num_added, max(0, num_added - num_moved))
    elif num_moved < 0:
        num_added = max(num_added, min(0, num_added - num_moved))
    if num_added < 0:
        removed_s = at_s
    elif num_added > 0 and at_s - removed_s < _REGRET_HOLDS * wish.hold_s:
        patience, removed_s = min(2.0 * patience, _MAX_PATIENCE), -math.inf
    changed_s = memory.changed_s if count == wish.bounds.target else at_s
    return replace(memory, target=count, patience=patience, removed_s=removed_s, changed_s=changed_s)


def _describe(name: str, wish: _Wish, count: int) -> str:
    before = wish.bounds.target
    change = f"{before}" if count == before else f"{before} to {count}"
    held = "" if count <= max(wish.need.num_engines, wish.bounds.least) else f"; held, careful {wish.need.careful:.2f}"
    return f"{name} {change}: {wish.need.why}{held}"
