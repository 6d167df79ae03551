"""How Ray Serve follows the planner: autoscaling policies of both pools and the ingress, called in Serve's controller.

They bring what replicas have told (`record_autoscaling_stats`) to the planner of their application. Those of the pools
answer with what that decides, and tell decode replicas their roles; that of the ingress answers with what Serve would.
They decide nothing themselves. Serve keeps a copy of this module for each policy, so what they share lives in
`planner/shared.py`.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from deployments.engine.stats import EngineStats
from deployments.planner.settings import PlannerSettings
from deployments.planner.shared import PoolView, planner_of
from deployments.planner.state import Bounds
from deployments.planner.wire import REFUSED, held_of, of_numbers
from deployments.planner_log import publish
from deployments.roles import tell_roles


class PoolPolicy:
    """See the module; made by Serve.

    Args:
        pool: `prefill` or `decode`.
        is_colocated: there is no prefill pool.
        settings: of the planner, as JSON has them.
    """

    def __init__(self, pool: str, is_colocated: bool, settings: Mapping[str, Any]) -> None:
        self._pool = pool
        self._is_colocated = is_colocated
        self._settings = PlannerSettings.model_validate(settings)

    def __call__(self, context: AutoscalingContext) -> tuple[int | float, dict[str, Any]]:
        """How many replicas there are to be, and what Serve is to keep for this policy: nothing."""
        planner = planner_of(context.app_name or "", self._settings, self._is_colocated)
        target = planner.decide(self._pool, view_of(context), context.current_time or 0.0)
        if (decisions := planner.take_news()) is not None:
            publish(context.app_name or "", decisions)
        tell_roles(*planner.take_orders())
        if self._settings.dry_run:
            by_default: tuple[int | float, dict[str, Any]] = replica_queue_length_autoscaling_policy(context)
            return by_default
        return target, {}


class IngressPolicy:
    """The same for the ingress: tells the planner what was refused and is held, and leaves the rest to Serve.

    Args:
        is_colocated: there is no prefill pool.
        settings: of the planner, as JSON has them.
    """

    def __init__(self, is_colocated: bool, settings: Mapping[str, Any]) -> None:
        self._is_colocated = is_colocated
        self._settings = PlannerSettings.model_validate(settings)

    def __call__(self, context: AutoscalingContext) -> tuple[int | float, dict[str, Any]]:
        """As many replicas as by Serve's own policy."""
        planner = planner_of(context.app_name or "", self._settings, self._is_colocated)
        told, _ = _told_last(context)
        planner.note_refused({name: int(of[REFUSED]) for name, of in told.items() if REFUSED in of})
        planner.note_held(held_of(told.values()))
        by_default: tuple[int | float, dict[str, Any]] = replica_queue_length_autoscaling_policy(context)
        return by_default


def view_of(context: AutoscalingContext) -> PoolView:
    """What Serve knows of a pool; replicas that have told nothing yet are still starting."""
    bounds = Bounds(
        context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas, context.target_num_replicas
    )
    told, as_of_s = _told_last(context)
    engines: dict[str, EngineStats] = {}
    for replica_name, numbers in told.items():
        if (stats := of_numbers(numbers)) is not None:
            engines[replica_name] = stats
    return PoolView(bounds, engines, as_of_s)


def _told_last(context: AutoscalingContext) -> tuple[dict[str, dict[str, float]], float]:
    """What each replica told last, by its name, and since when all of it is true."""
    told: dict[str, dict[str, float]] = {}
    as_of_s = context.current_time or 0.0
    for name, of_replicas in (context.raw_metrics or {}).items():
        for replica, series in of_replicas.items():
            if series:
                told.setdefault(replica.unique_id, {})[name] = series[-1].value
                as_of_s = min(as_of_s, series[-1].timestamp)
    return told, as_of_s
