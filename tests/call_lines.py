"""The lines of calls, as `deployments/telemetry/request_log.py` writes them, for tests to read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.telemetry.client_stats import ClientCounts
from deployments.telemetry.followers import ObservedCalls
from deployments.telemetry.request_log import log_call, logger


class _Keeper(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


@contextmanager
def kept_lines() -> Iterator[list[logging.LogRecord]]:
    """What is logged meanwhile. Ray Serve's logger hands nothing on to others, once somebody has imported that."""
    records: list[logging.LogRecord] = []
    keeper, level = _Keeper(records), logger.level
    logger.addHandler(keeper)
    logger.setLevel(logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(keeper)
        logger.setLevel(level)


def logging_observer() -> ObservedCalls:
    """What an ingress that logs gives its API."""
    return ObservedCalls(ClientCounts(), [log_call])
