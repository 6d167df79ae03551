"""Ways to choose how many replicas there are: fixed, as Ray Serve does unless told otherwise, and the planner."""

import math
from collections import deque
from dataclasses import dataclass, field

from deployments.load.held import Held
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.planner.observer import Observer
from deployments.planner.plan import plan
from deployments.planner.settings import PlannerSettings
from deployments.planner.shared import PERIOD_S
from deployments.planner.state import Bounds, Memory
from deployments.simulator.pools import PoolState


class Fixed:
    """As many as there are."""

    period_s = 60.0
    wakes = False

    def decide(
        self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int, held: Held
    ) -> dict[str, int]:
        return {name: pool.target for name, pool in pools.items()}


@dataclass(slots=True)
class _ServePool:
    """One deployment, scaled as by Ray Serve."""

    seen: deque[tuple[float, int]] = field(default_factory=deque)
    wants_since_s: float | None = None
    direction: int = 0


class ServeDefault:
    """By the mean number of ongoing requests over a while, each pool by itself, after a delay.

    Args:
        target: ongoing requests of a replica, by pool.
        upscale_delay_s: more are wanted for so long before there are more.
        downscale_delay_s: likewise for fewer.
        look_back_s: of the mean.

    Source: `replica_queue_length_autoscaling_policy` and `_apply_delay_logic` of Ray Serve 2.60, whose defaults these
    are; a test holds both to the same decisions.
    """

    period_s = 1.0
    wakes = False

    def __init__(
        self,
        target: dict[str, float] | None = None,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
        look_back_s: float = 30.0,
    ) -> None:
        self._target = target or {DECODE: 2.0, PREFILL: 2.0}
        self._delay_s = {1: upscale_delay_s, -1: downscale_delay_s}
        self._look_back_s = look_back_s
        self._pools: dict[str, _ServePool] = {}

    def decide(
        self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int, held: Held
    ) -> dict[str, int]:
        return {name: self._decide(name, pool, at_s) for name, pool in pools.items()}

    def _decide(self, name: str, pool: PoolState, at_s: float) -> int:
        own = self._pools.setdefault(name, _ServePool())
        own.seen.append((at_s, pool.num_ongoing))
        while own.seen[0][0] < at_s - self._look_back_s:
            own.seen.popleft()
        mean = sum(ongoing for _, ongoing in own.seen) / len(own.seen)
        wanted = math.ceil(mean / self._target[name]) if pool.num_ready else pool.target
        wanted = min(max(wanted, pool.least), pool.most)
        direction = (wanted > pool.target) - (wanted < pool.target)
        if direction != own.direction or not direction:
            own.wants_since_s, own.direction = at_s if direction else None, direction
        if direction and own.wants_since_s is not None and at_s - own.wants_since_s >= self._delay_s[direction]:
            own.wants_since_s, own.direction = None, 0
            return wanted
        return pool.target


class Planned:
    """The project's planner.

    Args:
        settings: of it.
        is_colocated: there is no prefill pool.

    Attributes:
        changes: when a target changed, and why.
    """

    period_s = PERIOD_S
    wakes = True

    def __init__(self, settings: PlannerSettings, is_colocated: bool = False) -> None:
        self._settings = settings
        self._observer = Observer(settings, is_colocated)
        self._memory = Memory()
        self.changes: list[tuple[float, str]] = []

    def decide(
        self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int, held: Held
    ) -> dict[str, int]:
        self._observer.note_held(held)
        seen = self._observer.observe(reading, at_s, num_refused)
        bounds = {name: Bounds(pool.least, pool.most, pool.target) for name, pool in pools.items()}
        decided, self._memory = plan(seen, (bounds[DECODE], bounds.get(PREFILL)), self._settings, self._memory)
        targets = {DECODE: decided.decode} | ({PREFILL: decided.prefill} if PREFILL in pools else {})
        for name, target in targets.items():
            self._observer.note_asked(name, target - pools[name].target, at_s)
        if any(target != pools[name].target for name, target in targets.items()):
            self.changes.append((at_s, decided.reason))
        return targets
