"""Whether the pools can serve: asked again and again in the background, so that whoever wants to know need not wait.

A pool can serve if one of its replicas answered at most `MAX_AGE_S` ago; so a pool that stops to answer is told of that
much later at most. The ingress runs it, and answers `/health` by it. Knows no Ray: how a pool is asked it is told.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from deployments.errors import brief

# Twice within the bound. Asking one pool each second took an idle service about 1% of a core (2026-11-27).
PERIOD_S = 2.0
# Longer than a step takes, behind which an answer may wait.
MAX_AGE_S = 5.0

Ask = Callable[[], Awaitable[object]]


class PoolHealth:
    """What the pools last answered.

    Args:
        asks: by the name of a pool, what returns once a replica of it can serve, and raises if one cannot.
        clock: in seconds.
    """

    def __init__(self, asks: Mapping[str, Ask], clock: Callable[[], float] = time.monotonic) -> None:
        self._asks = asks
        self._clock = clock
        self._answered_s: dict[str, float] = {}
        self._failures: dict[str, str] = {}

    def state(self) -> tuple[bool, str]:
        """Whether every pool can serve, and if not, which one cannot, and why."""
        for name in self._asks:
            answered_s = self._answered_s.get(name)
            if answered_s is None or self._clock() - answered_s > MAX_AGE_S:
                return False, f"the {name} pool {self._failures.get(name, f'did not answer in {MAX_AGE_S:.0f} s')}"
        return True, "ok"

    async def watch(self, period_s: float = PERIOD_S) -> None:
        """Ask every pool until cancelled, each period anew: the next replica may answer where one does not."""
        async with asyncio.TaskGroup() as asking:
            while True:
                for name, ask in self._asks.items():
                    asking.create_task(self._ask(name, ask))
                await asyncio.sleep(period_s)

    async def _ask(self, name: str, ask: Ask) -> None:
        try:
            async with asyncio.timeout(MAX_AGE_S):
                await ask()
        except TimeoutError:
            self._failures.pop(name, None)
        except Exception as error:
            self._failures[name] = f"cannot serve: {brief(error)}"
        else:
            self._answered_s[name] = self._clock()
