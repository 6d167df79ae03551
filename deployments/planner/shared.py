"""The planner of one application, shared by the policies of its pools in Ray Serve's controller.

Each policy brings what it knows of its pool, about twice a second, and is told how many replicas to have; both are
decided at once, whoever asks. Knows no Ray.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.engine.stats import EngineStats
from deployments.load.held import Held
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.planner.flip import choose_flipped
from deployments.planner.observer import Observer
from deployments.planner.plan import Plan, plan
from deployments.planner.settings import PlannerSettings
from deployments.planner.state import Bounds, Memory

# Ray Serve's own: its controller writes what this one says, and of others warnings alone.
logger = logging.getLogger("ray.serve")

# Looking each second it saw more short queues, and answered bursts with the wrong pool: see docs/log.md.
PERIOD_S = 2.0
# A pool whose policy was not asked while another's was, so many times, is not scaled by it, and nothing is known of it.
# Not seconds: the controller itself may stand still for some, as when replicas start.
_MAX_MISSED = 20
# Beside the pools' names, among what was planned.
_FLIPPED = "flipped"
# Of its decisions so many are kept to be shown.
MAX_DECISIONS = 20


@dataclass(frozen=True, slots=True)
class Decision:
    """The planner wanted other numbers of replicas than before, or said for the first time what it wants.

    Attributes:
        at_s: Unix time.
        before: replicas that each pool had, or was getting.
        targets: that each is to have.
        reason: in words.
        is_dry_run: nobody follows.
    """

    at_s: float
    before: Mapping[str, int]
    targets: Mapping[str, int]
    reason: str
    is_dry_run: bool


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
        before: planned for the same pools by other settings; None: nobody did. What has come and what it costs stays
            known, unless other bounds are to be kept.
    """

    def __init__(self, settings: PlannerSettings, is_colocated: bool, before: "SharedPlanner | None" = None) -> None:
        self.settings = settings
        self.is_colocated = is_colocated
        is_known = before is not None and _what_is_observed(before.settings) == _what_is_observed(settings)
        self._observer: Observer = (
            before._observer if before is not None and is_known else Observer(settings, is_colocated)
        )
        self._memory: Memory = Memory() if before is None else before._memory
        self._views: dict[str, PoolView] = {}
        self._targets: dict[str, int] = {}  # as planned last
        self._answers: dict[str, int] = {}  # as each policy was told last
        self._decided_s = -math.inf
        self._refused_before: Mapping[str, int] = {}
        self._num_refused = 0
        self._num_held = 0
        self._is_silent = False
        self._num_missed: dict[str, int] = {}
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._is_news = False
        self._flipped: frozenset[str] = frozenset()  # decode replicas that are to compute prompts
        self._known: frozenset[str] = frozenset()  # decode replicas of which it was decided
        self._orders: tuple[list[str], list[str]] = ([], [])

    def take_news(self) -> Sequence[Decision] | None:
        """Its last decisions, the newest at the end, if there is one that was not asked for yet."""
        is_news, self._is_news = self._is_news, False
        return [*self._decisions] if is_news else None

    def note_refused(self, counts: Mapping[str, int]) -> None:
        """How many calls each ingress replica has refused so far; what one tells first is past."""
        before = self._refused_before
        self._num_refused += sum(max(0, count - before.get(name, count)) for name, count in counts.items())
        self._refused_before = {**before, **counts}

    def note_held(self, held: Held) -> None:
        """What ingresses hold now; what has just begun to wait is planned for at once."""
        if held.count and not self._num_held:
            self._decided_s = -math.inf
        self._num_held = held.count
        self._observer.note_held(held)

    def decide(self, pool: str, view: PoolView, at_s: float) -> int:
        """How many replicas a pool is to have now."""
        self._views[pool] = view
        names = [DECODE] if self.is_colocated else [DECODE, PREFILL]
        self._num_missed = {name: 0 if name == pool else self._num_missed.get(name, 0) + 1 for name in names}
        if not self.settings.dry_run and view.bounds.target != self._answers.get(pool):
            self._targets.pop(pool, None)  # somebody else has set it, and the next plan begins with that
        if self._is_known(names) and at_s - self._decided_s >= PERIOD_S:
            self._decided_s = at_s
            self._decide(names, at_s)
        bounds = view.bounds
        target = min(max(self._targets.get(pool, bounds.target), bounds.least), bounds.most)
        if not self.settings.dry_run:
            self._views[pool] = replace(view, bounds=replace(bounds, target=target))
            self._answers[pool] = target
        return target

    def _is_known(self, names: list[str]) -> bool:
        """Whether all pools have told something, and are still scaled by their policies."""
        views = [self._views.get(name) for name in names]
        silent = [name for name in names if self._num_missed[name] >= _MAX_MISSED and not self._is_starting(name)]
        if silent and not self._is_silent:
            logger.warning(
                "the planner decides nothing: %s is not scaled by it. Leave autoscaling_config of it out of Serve's "
                "file, and deploy again",
                " and ".join(silent),
            )
            self._targets.clear()
        self._is_silent = bool(silent)
        return not silent and all(view is not None and (view.engines or not view.bounds.least) for view in views)

    def _is_starting(self, pool: str) -> bool:
        """No replica serves yet: while requests wait for the first, Serve asks no policy, and starts one by itself."""
        return pool in self._views and not self._views[pool].engines

    def _decide(self, names: list[str], at_s: float) -> None:
        views = {name: self._views[name] for name in names}
        flipped = self._note_roles(views[DECODE].engines)
        engines = {name: dict(view.engines) for name, view in views.items()}
        if flipped:
            engines[PREFILL] |= {name: engines[DECODE].pop(name) for name in flipped}
        reading = Reading(engines, min(view.as_of_s for view in views.values()))
        seen = self._observer.observe(reading, at_s, self._num_refused)
        self._num_refused = 0
        seen = replace(seen, num_flipped=len(flipped))
        memory = self._memory
        if self.settings.dry_run:
            # Nobody follows: what there is was not set by hand.
            memory = replace(
                memory,
                decode=replace(memory.decode, target=views[DECODE].bounds.target),
                prefill=replace(memory.prefill, target=views[PREFILL].bounds.target if PREFILL in views else None),
                num_flipped=0,
            )
        prefill = views[PREFILL].bounds if PREFILL in views else None
        decided, self._memory = plan(seen, (views[DECODE].bounds, prefill), self.settings, memory)
        self._follow(decided, views, at_s)

    def _note_roles(self, engines: Mapping[str, EngineStats]) -> frozenset[str]:
        """The decode replicas that compute prompts: as was decided, and those of which nothing was, as they say."""
        told = {name for name, stats in engines.items() if stats.is_flipped}
        if self.settings.flip:
            self._flipped = frozenset((self._flipped & engines.keys()) | (told - self._known))
            self._known = frozenset(engines)
        return self._flipped

    def take_orders(self) -> tuple[list[str], list[str]]:
        """Decode replicas that are to be told to compute prompts, and to decode; each decision says it again."""
        orders, self._orders = self._orders, ([], [])
        return orders

    def _order_roles(self, count: int, engines: Mapping[str, EngineStats]) -> None:
        self._flipped = choose_flipped(self._flipped, engines, count)
        told = {name for name, stats in engines.items() if stats.is_flipped}
        self._orders = sorted(self._flipped - told), sorted(told - self._flipped)

    def _follow(self, decided: Plan, views: Mapping[str, PoolView], at_s: float) -> None:
        targets = {DECODE: decided.decode} | ({PREFILL: decided.prefill} if PREFILL in views else {})
        is_change = any(target != views[name].bounds.target for name, target in targets.items())
        planned = targets | {_FLIPPED: decided.num_flipped}
        if planned != self._targets:
            before = {name: view.bounds.target for name, view in views.items()}
            self._decisions.append(Decision(at_s, before, targets, decided.reason, self.settings.dry_run))
            self._is_news = True
        if (is_change or decided.num_flipped != len(self._flipped)) and planned != self._targets:
            logger.info("%s%s", "dry run, nothing is done: " if self.settings.dry_run else "", decided.reason)
        if not self.settings.dry_run:
            self._order_roles(decided.num_flipped, views[DECODE].engines)
            for name, target in targets.items():
                self._observer.note_asked(name, target - views[name].bounds.target, at_s)
        self._targets = planned


def _what_is_observed(settings: PlannerSettings) -> tuple[float, ...]:
    return settings.ttft_s, settings.itl_s, settings.start_s


_planners: dict[str, SharedPlanner] = {}


def planner_of(app: str, settings: PlannerSettings, is_colocated: bool) -> SharedPlanner:
    """The planner of an application; once its settings are others, another one that knows what the first one did."""
    known = _planners.get(app)
    if known is None or known.is_colocated != is_colocated:
        known = _planners[app] = SharedPlanner(settings, is_colocated)
    elif known.settings != settings:
        known = _planners[app] = SharedPlanner(settings, is_colocated, known)
    return known
