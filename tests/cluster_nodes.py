"""What engines ask of a node, and which nodes Ray's autoscaler would start for it."""

from functools import partial
from typing import Any

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

from app.config import AppConfig, Pool

POOLS: tuple[Pool, Pool] = ("prefill", "decode")


def demand(config: AppConfig, pool: Pool) -> dict[str, Any]:
    """What one engine and its front ask of a single node: the bundles are packed strictly."""
    options = config.deployment_options(pool)
    assert options["placement_group_strategy"] == "STRICT_PACK"
    bundles: list[dict[str, Any]] = options["placement_group_bundles"]
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for bundle in bundles for name in bundle}


def nodes_started_for(cluster: dict[str, Any], demands: list[dict[str, Any]]) -> dict[str, int]:
    """Ask Ray's autoscaler, with its configuration, which nodes it would start."""
    scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    types, head = cluster["available_node_types"], cluster["head_node_type"]
    nodes, unmet = get_nodes_for(types, {head: 1}, head, cluster["max_workers"], demands, scorer)
    assert not unmet, f"no type of node holds {unmet}"
    return dict(nodes)
