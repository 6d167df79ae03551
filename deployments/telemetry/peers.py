"""Reads the numbers of all ingress replicas, for behind a proxy whoever asks one of them means all."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from deployments.telemetry.ingress_stats import IngressStats

logger = logging.getLogger(__name__)

# Prometheus gives up after 10 s by default.
TIMEOUT_S = 2.0

# Each ingress replica's own numbers, this one's among them, or why one did not say.
Ask = Callable[[], Awaitable[Sequence[IngressStats | BaseException]]]


@dataclass(frozen=True, slots=True)
class IngressReading:
    """The ingress replicas as they were.

    Attributes:
        replicas: that answered, by their names in order; the one that asked is always among them.
        num_silent: that did not answer in time.
    """

    replicas: Sequence[IngressStats]
    num_silent: int = 0


class Peers:
    """The ingress replicas of this application.

    Args:
        ask: them all; bounded in time.
        own: numbers of this replica, which waits for nobody.
    """

    def __init__(self, ask: Ask, own: Callable[[], IngressStats]) -> None:
        self._ask = ask
        self._own = own
        self._num_known = 1
        self._is_failing = False

    async def read(self) -> IngressReading:
        """The numbers of all that answer."""
        answers = await self._ask_all()
        own = self._own()
        replicas = {stats.replica: stats for stats in answers if isinstance(stats, IngressStats)} | {own.replica: own}
        num_silent = max(0, self._num_known - len(replicas))
        return IngressReading([stats for _, stats in sorted(replicas.items())], num_silent)

    async def _ask_all(self) -> Sequence[IngressStats | BaseException]:
        """Their answers; none where Serve does not say who they are, so that those known before are silent."""
        try:
            answers = await self._ask()
        except Exception as error:
            if not self._is_failing:  # once, and not at each scrape
                logger.warning("the other ingress replicas cannot be asked for their numbers: %r", error)
            self._is_failing = True
            return []
        self._is_failing = False
        self._num_known = max(1, len(answers))
        return answers
