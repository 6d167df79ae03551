"""How Ray Serve follows the planner: an autoscaling policy of either pool, called in Serve's controller.

It brings what the replicas of its pool have told (`EngineReplica.record_autoscaling_stats`) to the planner of its
application, and answers with what that decides; it decides nothing. Serve keeps a copy of this module for each policy,
so what both share lives in `planner/shared.py`.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from deployments.engine.stats import EngineStats
from deployments.planner.plan import Bounds
from deployments.planner.settings import PlannerSettings
from deployments.planner.shared import PoolView, planner_of
from deployments.planner.wire import of_numbers


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
        if self._settings.dry_run:
            by_default: tuple[int | float, dict[str, Any]] = replica_queue_length_autoscaling_policy(context)
            return by_default
        return target, {}


def view_of(context: AutoscalingContext) -> PoolView:
    """What Serve knows of a pool; replicas that have told nothing yet are still starting."""
    bounds = Bounds(
        context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas, context.target_num_replicas
    )
    told: dict[str, dict[str, float]] = {}
    as_of_s = context.current_time or 0.0
    for name, of_replicas in (context.raw_metrics or {}).items():
        for replica, series in of_replicas.items():
            if series:
                told.setdefault(replica.unique_id, {})[name] = series[-1].value
                as_of_s = min(as_of_s, series[-1].timestamp)
    engines: dict[str, EngineStats] = {}
    for replica_name, numbers in told.items():
        if (stats := of_numbers(numbers)) is not None:
            engines[replica_name] = stats
    return PoolView(bounds, engines, as_of_s)
