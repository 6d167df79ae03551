"""Nodes of a cluster that is one machine: Ray's own fake nodes, raylets whose GPUs are names.

Ray's autoscaler loads it by its name, in a process of its own, and starts and stops nodes by it.
"""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from app.ray_agents import choose_ports


class Nodes(FakeMultiNodeProvider):
    """As Ray's, whose raylets end themselves where their agents take 15 s to start: see `app/ray_agents.py`."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        choose_ports()
        super().__init__(provider_config, cluster_name)
