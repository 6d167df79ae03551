"""Errors as Ray and Serve raise and log them."""

import logging
from collections.abc import Iterator

import pytest
from ray.exceptions import RayTaskError

from deployments.errors import EngineDeadError, InvalidRequestError
from deployments.ray_errors import keep_refusals_out_of_logs

REFUSED = InvalidRequestError("regex is '(': an unclosed group", "guided_regex")
LOST = EngineDeadError("the engine's process is gone")


def in_an_actor(cause: Exception) -> Exception:
    """As Ray raises what was raised in an actor."""
    error: Exception = RayTaskError("add", "Traceback ...", cause).as_instanceof_cause()
    return error


@pytest.fixture
def serves() -> Iterator[logging.Logger]:
    """Serve's logger, as a replica has it."""
    logger = logging.getLogger("ray.serve")
    before = list(logger.filters)
    keep_refusals_out_of_logs()
    yield logger
    logger.filters[:] = before


@pytest.mark.parametrize(("error", "is_told"), [(REFUSED, False), (LOST, True), (ZeroDivisionError(), True)])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_request_that_is_refused_leaves_no_traceback_and_whatever_else_fails_does(
    serves: logging.Logger, error: Exception, is_told: bool, is_wrapped: bool
) -> None:
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[assignment,method-assign]
    serves.addHandler(handler)
    try:
        raise in_an_actor(error) if is_wrapped else error
    except Exception:
        serves.exception("Request failed.")
    finally:
        serves.removeHandler(handler)
    assert bool(told) == is_told


def test_lines_without_an_error_are_kept(serves: logging.Logger) -> None:
    assert serves.filter(logging.makeLogRecord({"msg": "Request failed."}))
