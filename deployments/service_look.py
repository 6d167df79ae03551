"""What the live page shows beside numbers: states of replicas as Ray Serve has them, and the planner's decisions.

The ingress has one. Ray is asked only while somebody looks, and seldom; what could not be had is left out. Serve's
states cost about 10 ms, for they come with the settings of every deployment (2.60, 2026-11-29): as long as all replicas
run, and are those of the last time, they are asked for less often.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import replace

from ray.serve._private.common import ReplicaState

from deployments import planner_log
from deployments.load.reading import DECODE, PREFILL
from deployments.serve_state import replica_states
from deployments.telemetry.live import ServiceState

logger = logging.getLogger(__name__)

# However many look and how often.
PERIOD_S = 5.0
# Of Serve's states, while nothing is seen to change.
CALM_PERIOD_S = 20.0
_POOLS = {"Prefill": PREFILL, "Decode": DECODE}


class ServiceLook:
    """See the module.

    Args:
        fixed: what never changes.
        app: name of the application.
        clock: in seconds.
    """

    def __init__(self, fixed: ServiceState, app: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._last = fixed
        self._app = app
        self._clock = clock
        self._asked_s = self._states_asked_s = -math.inf
        self._asking: asyncio.Task[None] | None = None
        self._is_calm = False
        self._seen: Hashable = None

    async def __call__(self, seen: Hashable = None) -> ServiceState:
        """As it was a few seconds ago at most; longer where Ray does not answer, or nothing changes.

        Args:
            seen: what whoever asks sees of the service; where it differs from what was seen before, something changes.
        """
        if seen != self._seen:
            self._seen, self._is_calm = seen, False
        if self._clock() - self._asked_s > PERIOD_S and (self._asking is None or self._asking.done()):
            self._asked_s = self._clock()
            self._asking = asyncio.create_task(self._ask())
            await asyncio.wait([self._asking], timeout=1.0)
        return self._last

    async def _ask(self) -> None:
        try:
            if not self._is_calm or self._asked_s - self._states_asked_s > CALM_PERIOD_S:
                await self._ask_states()
            decisions = await asyncio.to_thread(planner_log.read, self._app) if self._last.is_planned else ()
        except Exception as error:
            logger.warning("Ray does not say how the replicas and the planner are: %r", error)
            return
        if decisions != self._last.decisions:
            self._is_calm = False
        self._last = replace(self._last, decisions=decisions)

    async def _ask_states(self) -> None:
        self._states_asked_s, self._is_calm = self._asked_s, True  # what is seen meanwhile may say otherwise
        try:
            states = await asyncio.to_thread(replica_states, self._app)
        except BaseException:
            self._is_calm = False
            raise
        if any(state != ReplicaState.RUNNING for of in states.values() for state in of):
            self._is_calm = False
        pools = {_POOLS[name]: of for name, of in states.items() if name in _POOLS}
        num_ingresses = max(1, sum(states.get("Ingress", {}).values()))
        self._last = replace(self._last, states=pools, num_ingresses=num_ingresses)
