"""The planner of one application, shared by the policies of its pools in Ray Serve's controller.

Each policy brings what it knows of its pool, about twice a second, and is told how many replicas to have; both are
decided at once, whoever asks. Knows no Ray.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from deployments.engine.stats import EngineStats
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.planner.observer import Observer
from deployments.planner.plan import Bounds, Memory, Plan, plan
from deployments.planner.settings import PlannerSettings

logger = logging.getLogger(__name__)

PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a policy knows of its pool.

    Attributes:
        bounds: as they are set, and what it has or is getting.
        engines: what its replicas said last, by their names.
        as_of_s: they said so then or later.
    """

    bounds: Bounds
    engines: Mapping[str, EngineStats]
    as_of_s: float


class SharedPlanner:
    """See the module.

    Args:
        settings: of the planner.
        is_colocated: there is no prefill pool.
    """

    def __init__(self, settings: PlannerSettings, is_colocated: bool) -> None:
        self.settings = settings
        self.is_colocated = is_colocated
        self._observer = Observer(settings, is_colocated)
        self._memory = Memory()
        self._views: dict[str, PoolView] = {}
        self._targets: dict[str, int] = {}
        self._decided_s = float("-inf")
        self._reason = ""

    def decide(self, pool: str, view: PoolView, at_s: float) -> int:
        """How many replicas a pool is to have now."""
        self._views[pool] = view
        names = [DECODE] if self.is_colocated else [DECODE, PREFILL]
        is_known = all(name in self._views and self._views[name].engines for name in names)
        if is_known and at_s - self._decided_s >= PERIOD_S:
            self._decided_s = at_s
            self._decide(names, at_s)
        target = self._targets.get(pool, view.bounds.target)
        target = min(max(target, view.bounds.least), view.bounds.most)
        if not self.settings.dry_run:
            self._views[pool] = replace(view, bounds=replace(view.bounds, target=target))
        return target

    def _decide(self, names: list[str], at_s: float) -> None:
        views = {name: self._views[name] for name in names}
        reading = Reading(
            {name: view.engines for name, view in views.items()}, min(view.as_of_s for view in views.values())
        )
        seen = self._observer.observe(reading, at_s)
        memory = self._memory
        if self.settings.dry_run:
            # Nobody follows: what there is was not set by hand.
            memory = Memory(
                replace(memory.decode, target=views[DECODE].bounds.target),
                replace(memory.prefill, target=views[PREFILL].bounds.target if PREFILL in views else None),
            )
        prefill = views[PREFILL].bounds if PREFILL in views else None
        decided, self._memory = plan(seen, (views[DECODE].bounds, prefill), self.settings, memory)
        self._follow(decided, views, at_s)

    def _follow(self, decided: Plan, views: Mapping[str, PoolView], at_s: float) -> None:
        targets = {DECODE: decided.decode} | ({PREFILL: decided.prefill} if PREFILL in views else {})
        is_change = any(target != views[name].bounds.target for name, target in targets.items())
        if is_change and targets != self._targets:
            logger.info("%s%s", "dry run, nothing is done: " if self.settings.dry_run else "", decided.reason)
        if not self.settings.dry_run:
            for name, target in targets.items():
                self._observer.note_asked(name, target - views[name].bounds.target, at_s)
        self._targets = targets


_planners: dict[str, SharedPlanner] = {}


def planner_of(app: str, settings: PlannerSettings, is_colocated: bool) -> SharedPlanner:
    """The planner of an application; a new one once its settings are others."""
    known = _planners.get(app)
    if known is None or (known.settings, known.is_colocated) != (settings, is_colocated):
        known = _planners[app] = SharedPlanner(settings, is_colocated)
    return known
