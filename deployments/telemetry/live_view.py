"""Shows the service to those who look at it now: puts the document of `live.py` together for `/live`.

One lives in each ingress replica. While nobody looks it notes a reading of the pools each second, which was taken
anyway; all else happens when somebody does.
"""

import logging
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from deployments.load.reading import Reading
from deployments.telemetry.history import ClientHistory, History
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.live import Past, ServiceState, describe
from deployments.telemetry.single_flight import SingleFlight

logger = logging.getLogger(__name__)

# However many look, the document is made anew no more often.
_MIN_AGE_S = 0.9

Look = Callable[[Hashable], Awaitable[ServiceState]]
AskAll = Callable[[], Awaitable[Sequence[ClientHistory | BaseException]]]


async def _numbers_alone(_: Hashable) -> ServiceState:
    return ServiceState("", "disaggregated", "", (True, ""))


async def _nobody() -> Sequence[ClientHistory]:
    return ()


class LiveView:
    """See the module.

    Args:
        count: what this ingress replica has counted up to now; a snapshot.
        look: what there is to say of the service beside numbers; told what is seen of it, which changes where it does.
        ask_all: each ingress replica, this one among them, for what its clients saw; or why one did not say.
    """

    def __init__(
        self, count: Callable[[], IngressStats], look: Look = _numbers_alone, ask_all: AskAll = _nobody
    ) -> None:
        self._history = History(count)
        self._look = look
        self._ask_all = ask_all
        self._document: Mapping[str, object] = {}
        self._past = Past()
        self._made_s = -math.inf
        self._making = SingleFlight[None]()

    def take(self, reading: Reading) -> None:
        """A reading of the pools has come."""
        self._history.take(reading)

    def own_part(self) -> ClientHistory:
        """What the clients of this replica saw."""
        return self._history.clients()

    async def document(self, health: tuple[bool, str]) -> Mapping[str, object]:
        """What there is to show; `health`: whether the service can serve, and why not."""
        if time.monotonic() - self._made_s > _MIN_AGE_S:
            await self._making(partial(self._make, health))
        return self._document

    async def _make(self, health: tuple[bool, str]) -> None:
        seen = (health, *(name for pool in self._history.replicas.values() for name in pool))
        state = replace(await self._look(seen), health=health)
        self._history.note_states(state.states)
        others = await self._others() if state.num_ingresses > 1 else []
        self._document = describe(state, self._history, others, time.time(), self._past)
        self._made_s = time.monotonic()

    async def _others(self) -> list[ClientHistory]:
        own = self.own_part().replica
        try:
            answers = await self._ask_all()
        except Exception as error:
            logger.warning("the other ingress replicas cannot be asked what their clients saw: %r", error)
            return []
        return [answer for answer in answers if isinstance(answer, ClientHistory) and answer.replica != own]
