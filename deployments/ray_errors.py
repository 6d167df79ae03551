"""What Ray and Serve raise, in the project's own terms. The one place that knows their exceptions."""

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from deployments.errors import EngineDeadError, KvRelayError, OverloadedError, brief


def is_nobody_there(error: Exception) -> bool:
    """Whether a call to all replicas of a deployment has found that it has none."""
    return isinstance(error, DeploymentUnavailableError)


def as_ours(error: Exception) -> Exception:
    """The error as it was raised in the pool; the loss of a replica becomes `EngineDeadError`."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, KvRelayError):
        return cause
    if isinstance(cause, BackPressureError):
        return OverloadedError(f"overloaded: every replica of a pool is at its limit: {cause}")
    if isinstance(cause, RayActorError | ReplicaUnavailableError | DeploymentUnavailableError | grpc.RpcError):
        return EngineDeadError(f"a replica was lost while it served the request: {brief(cause)}")
    return error
