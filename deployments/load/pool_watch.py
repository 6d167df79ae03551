"""Reads the pools, again and again, and tells whoever decides by it. The ingress runs it in the background."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from deployments.load.reading import Pools, Reading

logger = logging.getLogger(__name__)

_CANNOT_READ = "the pools cannot be read, so admission and routing go by what they sent there themselves: %r"
PERIOD_S = 1.0
# However many ask for a reading, the engines are asked no more often.
MIN_PAUSE_S = 0.1

Read = Callable[[], Awaitable[Pools]]
Tell = Callable[[Reading], None]


class PoolWatch:
    """See the module. One reading at a time; one that fails leaves the last one to age.

    Args:
        read: of every pool its replicas.
        tell: told of each reading.
        period_s: pause between two readings.
        min_pause_s: the same, where somebody has asked for one.
        clock: that of whoever is told.
    """

    def __init__(
        self,
        read: Read,
        tell: Tell,
        period_s: float = PERIOD_S,
        min_pause_s: float = MIN_PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._tell = tell
        self._pauses_s = (min_pause_s, period_s - min_pause_s)
        self._clock = clock
        self._is_wanted = asyncio.Event()
        self._told = asyncio.Condition()
        self._last_taken_s = -math.inf

    async def run(self) -> None:
        """Read until cancelled."""
        is_failing = False
        while True:
            self._is_wanted.clear()
            taken_s = self._clock()
            try:
                pools = await self._read()
            except Exception as error:
                if not is_failing:  # once, and not every second
                    logger.warning(_CANNOT_READ, error)
                is_failing = True
            else:
                is_failing = False
                await self._announce(Reading.of(pools, taken_s), taken_s)
            await self._pause()

    async def _announce(self, reading: Reading, taken_s: float) -> None:
        self._tell(reading)
        self._last_taken_s = taken_s
        async with self._told:
            self._told.notify_all()

    async def refresh(self, timeout_s: float) -> bool:
        """Whether a reading was told that was taken after this call, within a time."""
        asked_s = self._clock()
        self._is_wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._told:
                await self._told.wait_for(lambda: self._last_taken_s >= asked_s)
                return True
        return False

    async def _pause(self) -> None:
        at_least_s, at_most_s = self._pauses_s
        await asyncio.sleep(at_least_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self._is_wanted.wait()
