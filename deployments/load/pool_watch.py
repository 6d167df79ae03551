"""Reads the pools, again and again, and tells whoever decides by it. The ingress runs it in the background."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from deployments.load.reading import Pools, Reading

logger = logging.getLogger(__name__)

PERIOD_S = 1.0

Read = Callable[[], Awaitable[Pools]]
Tell = Callable[[Reading], None]


async def watch_pools(
    read: Read, tell: Tell, period_s: float = PERIOD_S, clock: Callable[[], float] = time.monotonic
) -> None:
    """Read the pools until cancelled, one reading at a time; one that fails leaves the last one to age.

    Args:
        read: of every pool its replicas.
        tell: told of each reading.
        period_s: pause between two readings.
        clock: that of whoever is told.
    """
    is_failing = False
    while True:
        taken_s = clock()
        try:
            pools = await read()
        except Exception as error:
            if not is_failing:  # once, and not every second
                logger.warning(
                    "the pools cannot be read, so admission and routing go by what they sent there themselves: %r",
                    error,
                )
            is_failing = True
        else:
            is_failing = False
            tell(Reading.of(pools, taken_s))
        await asyncio.sleep(period_s)
