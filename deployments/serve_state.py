"""What Ray Serve knows of this service: where it listens, how many replicas like this one run.

The ingress asks, from a thread: the answers come from Serve's controller.
"""

from ipaddress import ip_address

from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client  # nothing public tells of the host


def http_host() -> str | None:
    """The address on which the API listens; None: on none."""
    client = _get_global_client()
    assert client is not None  # else it raises
    host: str | None = client.http_config.host
    return host


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host in (None, "localhost") or ip_address(host or "").is_loopback
    except ValueError:  # a name
        return False


def num_replicas() -> int:
    """How many replicas of the asking replica's deployment run, at least one."""
    context = serve.get_replica_context()
    deployment = serve.status().applications[context.app_name].deployments[context.deployment]
    num_running: int = deployment.replica_states.get(ReplicaState.RUNNING, 0)
    return max(1, num_running)
