"""What the live page shows beside numbers: states of replicas as Ray Serve has them, and the planner's decisions.

The ingress has one. Ray is asked only while somebody looks, and seldom; what could not be had is left out.
"""

import asyncio
import logging
import math
import time
from dataclasses import replace

from deployments import planner_log
from deployments.load.reading import DECODE, PREFILL
from deployments.serve_state import replica_states
from deployments.telemetry.live import ServiceState

logger = logging.getLogger(__name__)

# However many look and how often.
PERIOD_S = 5.0
_POOLS = {"Prefill": PREFILL, "Decode": DECODE}


class ServiceLook:
    """See the module.

    Args:
        fixed: what never changes.
        app: name of the application.
    """

    def __init__(self, fixed: ServiceState, app: str) -> None:
        self._last = fixed
        self._app = app
        self._asked_s = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self) -> ServiceState:
        """As it was a few seconds ago at most; longer where Ray does not answer."""
        if time.monotonic() - self._asked_s > PERIOD_S and (self._asking is None or self._asking.done()):
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
            await asyncio.wait([self._asking], timeout=1.0)
        return self._last

    async def _ask(self) -> None:
        try:
            states = await asyncio.to_thread(replica_states, self._app)
            decisions = await asyncio.to_thread(planner_log.read, self._app) if self._last.is_planned else ()
        except Exception as error:
            logger.warning("Ray does not say how the replicas and the planner are: %r", error)
            return
        pools = {_POOLS[name]: of for name, of in states.items() if name in _POOLS}
        num_ingresses = max(1, sum(states.get("Ingress", {}).values()))
        self._last = replace(self._last, states=pools, num_ingresses=num_ingresses, decisions=decisions)
