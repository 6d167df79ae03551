"""What Ray Serve knows of this service: where it listens, how many replicas like this one run, what each of them says.

The ingress asks; but for `ask_each` from a thread: the answers come from Serve's controller.
"""

import asyncio
from collections.abc import Mapping
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client  # nothing public tells of the host

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


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


def replica_states(app: str) -> Mapping[str, Mapping[str, int]]:
    """Of each deployment of an application, how many replicas are in which state, in Serve's words."""
    deployments = serve.status().applications[app].deployments
    return {
        name: {str(state): count for state, count in deployment.replica_states.items() if count}
        for name, deployment in deployments.items()
    }


@cache
def own_handle() -> "DeploymentHandle[Any]":
    """Of the asking replica's own deployment. Got once: Serve tells Ray's GCS of each time (2.60)."""
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


async def ask_each(handle: "DeploymentHandle[Any]", method: str, timeout_s: float) -> list[Any]:
    """What each replica answers within a time, or the exception why it does not.

    Ray Serve's own `results_async` gives up all answers where one does not come (2.60).

    Raises:
        Exception: Serve does not say which replicas there are.
    """
    async with asyncio.timeout(timeout_s):
        replicas = await handle.broadcast(method)._fetch_replica_results_async()

    async def answer_of(replica: Any) -> Any:  # asked for in here: who is cancelled before has asked nothing
        return await asyncio.wait_for(replica.get_async(), timeout_s)

    return await asyncio.gather(*map(answer_of, replicas), return_exceptions=True)
