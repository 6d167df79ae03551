"""What Ray and Serve raise, in the project's own terms. The one place that knows their exceptions."""

import logging

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from deployments.errors import EngineDeadError, InvalidRequestError, KvRelayError, OverloadedError, brief


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


def keep_refusals_out_of_logs() -> None:
    """Have Serve write no traceback in this replica's log where a request is refused: its caller is told why."""
    logging.getLogger("ray.serve").addFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, Exception) and isinstance(as_ours(error), InvalidRequestError))
