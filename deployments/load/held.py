"""Requests that wait until there is a decode replica, where there may be none. Each ingress replica has its own.

Such a request is in no engine and in no queue of Ray Serve's. It is counted here, and the planner hears of it from
here, which starts as many replicas as those that wait need. Readings tell that replicas have come. They do not come all
at once, so for a few seconds the first one is given no more than it has seats for. Knows no Ray. The simulator holds
its requests by the same code, without coroutines.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.errors import OverloadedError, StartingError
from deployments.load.reading import DECODE, Reading

# From the first replica until all go that wait, whether there is a seat for each or not.
SPREAD_S = 5.0
# What a client is told to wait while no start was seen.
_UNKNOWN_RETRY_S = 10.0
# A start that took too long is told of for so long, unless somebody waits still.
_OVERDUE_S = 60.0


@dataclass(frozen=True, slots=True)
class HoldBounds:
    """What a hold keeps.

    Attributes:
        max_requests: that wait in one ingress replica.
        max_s: that each waits.
    """

    max_requests: int
    max_s: float


@dataclass(frozen=True, slots=True)
class Held:
    """Those that wait now.

    Attributes:
        count: requests.
        tokens: of their prompts.
        oldest_s: for which the first of them has waited.
    """

    count: int = 0
    tokens: int = 0
    oldest_s: float = 0.0


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits; `go` is called once, when it may go to a replica."""

    num_tokens: int
    since_s: float
    go: Callable[[], None]


class HeldRequests:
    """See the module. Nobody waits while there is a replica, nor before anything was read. Not thread-safe.

    Args:
        bounds: what it keeps.
        on_first: called when somebody waits and nobody did: readings are wanted soon.
        clock: monotonic seconds.

    Attributes:
        max_s: that a request waits.
    """

    def __init__(
        self, bounds: HoldBounds, on_first: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bounds = bounds
        self.max_s = bounds.max_s
        self._on_first = on_first
        self._clock = clock
        self._waiting: dict[Waiting, None] = {}  # in the order in which they came
        self._num_tokens = 0
        self._is_closed = False
        self._opened_s = -math.inf
        self._num_sent = 0  # since it was opened
        self._start_took_s: float | None = None
        self._timed_out_s = -math.inf

    @property
    def is_closed(self) -> bool:
        """Whether there is no replica."""
        return self._is_closed

    @property
    def is_overdue(self) -> bool:
        """Whether a request has waited in vain, and no replica has come since."""
        return bool(self._waiting and self._timed_out_s > -math.inf) or self._clock() - self._timed_out_s < _OVERDUE_S

    def now(self) -> Held:
        """Those that wait now."""
        if not self._waiting:
            return Held()
        return Held(len(self._waiting), self._num_tokens, self._clock() - next(iter(self._waiting)).since_s)

    async def wait(self, num_tokens: int) -> None:
        """Return when a request with so many prompt tokens may go to a replica. Cancelling this forgets it.

        Raises:
            OverloadedError: too many wait.
            StartingError: none came in time.
        """
        go = asyncio.get_running_loop().create_future()
        request = self.enter(num_tokens, lambda: None if go.done() else go.set_result(None))
        if request is None:
            return
        try:
            async with asyncio.timeout(self.max_s):
                await go
        except TimeoutError:
            raise self.give_up() from None
        finally:
            self.leave(request)

    def enter(self, num_tokens: int, go: Callable[[], None]) -> Waiting | None:
        """Have a request with so many prompt tokens wait until `go` is called; None: it may go at once.

        Raises:
            OverloadedError: too many wait.
        """
        if not (self._is_closed or self._waiting):
            return None
        bounds = self._bounds
        if len(self._waiting) >= bounds.max_requests:
            raise OverloadedError(
                f"overloaded: {len(self._waiting)} requests wait for a decode replica to start, at most "
                f"{bounds.max_requests} may (decode.max_queued_requests)",
                self._retry_s,
            )
        request = Waiting(num_tokens, self._clock(), go)
        self._waiting[request] = None
        self._num_tokens += num_tokens
        if len(self._waiting) == 1:
            self._on_first()
        return request

    def leave(self, request: Waiting) -> bool:
        """It waits no longer; False: it did not."""
        if request not in self._waiting:
            return False
        del self._waiting[request]
        self._num_tokens -= request.num_tokens
        return True

    def give_up(self) -> StartingError:
        """A request has waited for too long: what it is told."""
        self._timed_out_s = self._clock()
        return StartingError(
            f"no decode replica runs, and the one that is being started did not come within {self.max_s:g} s "
            "(ingress.max_start_s); try again later",
            self._retry_s,
        )

    def update(self, reading: Reading) -> None:
        """Take a reading: let go as many as there is room for."""
        engines = reading.pools[DECODE].values()
        now_s = self._clock()
        if not engines:
            self._is_closed, self._num_sent = True, 0
            return
        self._timed_out_s = -math.inf
        if self._is_closed:
            self._is_closed, self._opened_s = False, now_s
            self._start_took_s = self.now().oldest_s or self._start_took_s
        room = sum(engine.max_num_seqs for engine in engines) - self._num_sent
        num_going = len(self._waiting) if now_s - self._opened_s >= SPREAD_S else max(0, room)
        for request in [*self._waiting][:num_going]:
            self._num_sent += 1
            self.leave(request)
            request.go()

    @property
    def _retry_s(self) -> float:
        return _UNKNOWN_RETRY_S if self._start_took_s is None else self._start_took_s
