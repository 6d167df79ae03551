"""What has Ray Serve follow the planner: fields of its AutoscalingConfig for each deployment. `app/config.py` asks."""

from typing import Any

from deployments.planner.settings import PlannerSettings

# Ray Serve loads them by these names.
_POOL_POLICY = "deployments.pool_policy.PoolPolicy"
_INGRESS_POLICY = "deployments.pool_policy.IngressPolicy"
# Replicas tell the controller their numbers so often, and those of so long. The first field is deprecated in favour of
# environment variables that Ray 2.60 reads nowhere; without it the numbers are up to 16 s old.
_TELL_PERIOD_S, TELL_SPAN_S = 1.0, 5.0
# Where a request may wait for the first decode replica: it is told of after one period, or two.
_HELD_PERIOD_S = 0.25


def planned_pool(pool: str, is_colocated: bool, planner: PlannerSettings) -> dict[str, Any]:
    """For `prefill` or `decode`."""
    tells = {"metrics_interval_s": _TELL_PERIOD_S, "policy": _policy(_POOL_POLICY, is_colocated, planner, pool=pool)}
    if planner.dry_run:
        return tells  # Serve decides, by its own means and after its own delays
    # The planner waits by itself, and looks at what was told last.
    return tells | {"look_back_period_s": TELL_SPAN_S, "upscale_delay_s": 0.0, "downscale_delay_s": 0.0}


def telling_ingress(is_colocated: bool, planner: PlannerSettings, *, holds: bool) -> dict[str, Any]:
    """For the ingress, of which Serve decides; the planner learns what it refuses, and what it holds if it does."""
    period_s = _HELD_PERIOD_S if holds else _TELL_PERIOD_S
    return {"metrics_interval_s": period_s, "policy": _policy(_INGRESS_POLICY, is_colocated, planner)}


def _policy(name: str, is_colocated: bool, planner: PlannerSettings, **more: str) -> dict[str, Any]:
    arguments = {"is_colocated": is_colocated, "settings": planner.model_dump(mode="json")} | more
    return {"policy_function": name, "policy_kwargs": arguments}
