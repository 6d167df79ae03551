"""Tells admission how the pools are, again and again. The ingress runs it in the background."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from deployments.load.admission import Admission
from deployments.metrics import ReplicaStats

logger = logging.getLogger(__name__)

PERIOD_S = 1.0

Read = Callable[[], Awaitable[dict[str, list[ReplicaStats]]]]


async def watch_pools(
    read: Read, admission: Admission, period_s: float = PERIOD_S, clock: Callable[[], float] = time.monotonic
) -> None:
    """Read the pools until cancelled, one reading at a time; one that fails leaves the last one to age.

    Args:
        read: of every pool its replicas.
        admission: is told of each reading.
        period_s: pause between two readings.
        clock: that of `admission`.
    """
    is_failing = False
    while True:
        taken_s = clock()
        try:
            pools = await read()
        except Exception as error:
            if not is_failing:  # once, and not every second
                logger.warning("the pools cannot be read, so admission goes by what it let in itself: %r", error)
            is_failing = True
        else:
            is_failing = False
            # Of different ages; what is known of all is as old as the oldest.
            age_s = max((replica.age_s for pool in pools.values() for replica in pool), default=0.0)
            engines = {name: {r.replica: r.engine for r in pool} for name, pool in pools.items()}
            admission.update(engines, taken_s - age_s)
        await asyncio.sleep(period_s)
