"""What an error looks like to a client: its status code and its body in OpenAI's shape. Whoever answers sends it."""

import logging
import math
from dataclasses import dataclass
from http import HTTPStatus

from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from deployments.api.accounts import RateLimitedError
from deployments.api.calls import ModelNotFoundError
from deployments.api.keys import ForbiddenError, UnauthorizedError
from deployments.api.observer import Outcome
from deployments.errors import (
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    RequestTooLargeError,
    SlowReaderError,
    StartingError,
    TransferError,
)

logger = logging.getLogger(__name__)


class ErrorDetails(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """An error in OpenAI's shape."""

    error: ErrorDetails


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a client sees it, in OpenAI's shape.

    Attributes:
        retry_after_s: when the same request could succeed.
        challenge: what a client has to bring to be let in.
    """

    status: HTTPStatus
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    challenge: str | None = None

    @property
    def outcome(self) -> Outcome:
        if self.status is HTTPStatus.TOO_MANY_REQUESTS:
            return Outcome.OVERLOADED
        if self.status is HTTPStatus.REQUEST_TIMEOUT:
            return Outcome.STALLED
        return Outcome.FAILED if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else Outcome.INVALID

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, at least 1, where trying again helps; `WWW-Authenticate` where a key does."""
        headers = {} if self.challenge is None else {"www-authenticate": self.challenge}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers

    def body(self) -> ErrorBody:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def log(self, call_id: str, error: Exception) -> None:
        if self.status is HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("%s failed", call_id, exc_info=error)
        elif self.outcome is Outcome.FAILED:
            logger.warning("%s failed: %s", call_id, error)


def failure_of(error: Exception) -> Failure:
    """What a client is told of an error; of one that nobody foresaw, no more than that."""
    match error:
        case ModelNotFoundError():
            return Failure(HTTPStatus.NOT_FOUND, str(error), param=error.param, code="model_not_found")
        case RequestTooLargeError():
            return Failure(HTTPStatus.BAD_REQUEST, str(error), param=error.param, code="context_length_exceeded")
        case InvalidRequestError():
            return Failure(HTTPStatus.BAD_REQUEST, str(error), param=error.param)
        case OverloadedError():
            return Failure(
                HTTPStatus.TOO_MANY_REQUESTS,
                str(error),
                "rate_limit_error",
                code="overloaded",
                retry_after_s=error.retry_after_s,
            )
        case RateLimitedError():
            return Failure(
                HTTPStatus.TOO_MANY_REQUESTS,
                str(error),
                error.unit,  # as OpenAI has it
                code="rate_limit_exceeded",
                retry_after_s=error.retry_after_s,
            )
        case UnauthorizedError():
            # RFC 6750: only who brought a key is told that it is not good.
            challenge = 'Bearer realm="kvrelay"' + (', error="invalid_token"' if error.is_wrong else "")
            return Failure(HTTPStatus.UNAUTHORIZED, str(error), code="invalid_api_key", challenge=challenge)
        case ForbiddenError():
            return Failure(HTTPStatus.FORBIDDEN, str(error), code="insufficient_permissions")
        case SlowReaderError():
            return Failure(HTTPStatus.REQUEST_TIMEOUT, str(error), code="client_too_slow")
        case EngineDeadError() | TransferError():
            return Failure(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "server_error", code="engine_unavailable")
        case StartingError():
            return Failure(
                HTTPStatus.SERVICE_UNAVAILABLE,
                str(error),
                "server_error",
                code="engine_starting",
                retry_after_s=error.retry_after_s,
            )
        case HTTPException():
            return Failure(HTTPStatus(error.status_code), error.detail)
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error", "server_error", code="internal_error")
