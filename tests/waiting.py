"""Waiting for what comes to be true and tells nobody; other processes, for the most part."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], timeout_s: float = 20.0, describe: Callable[[], object] = str) -> T:
    """What the condition gives once it is true.

    Args:
        condition: is asked again and again.
        timeout_s: after so long the test fails.
        describe: says, then, how things are.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not true after {timeout_s} s: {describe()}"
        time.sleep(0.02)
    return found


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Let the event loop turn until the condition is true; after so long the test fails."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0.001)
