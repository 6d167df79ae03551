"""A tier in this process: the same index, plain arrays for objects, and everything that can go wrong on request."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deployments.errors import TierError
from deployments.kv_tier.index import Found, Offer, Origins, TierCounts, TierIndex
from deployments.kv_tier.store import leading

Give = Callable[[bytes], tuple[Origins, np.ndarray] | None]


class LocalTier:
    """See the module. Each engine has a `LocalStore` of it.

    Attributes:
        is_away: the index does not answer, as while Ray restarts it.
        num_readable: so many reads succeed before the objects are found lost; None: all.
        goes_on: cleared, reads wait, for as long as they may.
        is_patient: they wait for longer than they may: until they go on.
        is_read: set once somebody reads.
        offered: all that was.
        on_find: called when somebody has been told what there is.
        error: that reads raise; None: none.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.index = TierIndex[np.ndarray](max_bytes)
        self.is_away = False
        self.num_readable: int | None = None
        self.is_patient = False
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.is_read = threading.Event()
        self.offered: list[Offer] = []
        self.on_find: Callable[[], None] = lambda: None
        self.error: Exception | None = None
        self.lock = threading.Lock()
        self._accepted: queue.SimpleQueue[tuple[Offer, Give] | None] = queue.SimpleQueue()
        self._idle = threading.Condition(self.lock)
        self._collector = threading.Thread(target=self._collect, daemon=True)
        self._collector.start()

    def offer(self, offers: Sequence[Offer], give: Give) -> None:
        with self.lock:
            self._check()
            self.offered += offers
            for accepted in self.index.accept(offers, time.monotonic()):
                self._accepted.put((accepted, give))

    def find(self, keys: Sequence[bytes]) -> list[Found[Any]]:
        with self.lock:
            self._check()
            found = leading(keys, self.index.find(keys, time.monotonic()))
        self.on_find()
        return found

    def read(self, found: Found[Any], timeout_s: float) -> np.ndarray:
        self.is_read.set()
        if not self.goes_on.wait(None if self.is_patient else timeout_s):
            raise TierError("it does not come in time")
        if self.error is not None and found.key[0] % 2:  # half of them come
            raise self.error
        with self.lock:
            if self.num_readable is not None:
                self.num_readable -= 1
                if self.num_readable < 0:
                    self.index.lose([found.key])
                    raise TierError("its owner died")
        data: np.ndarray = found.ref
        return data

    def restart(self) -> None:
        """As Ray restarts the index: what it held is gone."""
        with self.lock:
            self.index.clear()
            self.is_away = False

    def wait_for(self, num_objects: int) -> None:
        """Return when so many are there; the test's own timeout bounds it."""
        with self._idle:
            self._idle.wait_for(lambda: self.index.counts().num_objects >= num_objects)

    def wait_idle(self) -> None:
        """Return when nothing is on its way; likewise."""
        with self._idle:
            self._idle.wait_for(lambda: self.index.counts().num_pending == 0)

    def stop(self) -> None:
        """Collect what was accepted, or see that it is gone, and end."""
        self.goes_on.set()
        self._accepted.put(None)
        self._collector.join()
        self.index.check_integrity()

    def _check(self) -> None:
        if self.is_away:
            raise TierError("the index does not answer")

    def _collect(self) -> None:
        while (accepted := self._accepted.get()) is not None:
            offer, give = accepted
            try:
                given = give(offer.key)
            except Exception:  # its engine is gone
                given = None
            with self._idle:
                if given is None:
                    self.index.give_up(offer)
                else:
                    origins, data = given
                    kept = data.copy()
                    kept.flags.writeable = False  # as what Ray maps
                    self.index.store(offer, origins, kept, time.monotonic())
                self.index.check_integrity()
                self._idle.notify_all()


class LocalStore:
    """The tier as one engine sees it; `give` is set when the engine is there."""

    def __init__(self, tier: LocalTier, give: Give = lambda key: None) -> None:
        self.tier = tier
        self.give = give

    def offer(self, offers: Sequence[Offer]) -> TierCounts:
        self.tier.offer(offers, self.give)
        return self.tier.index.counts()

    def find(self, keys: Sequence[bytes], timeout_s: float) -> list[Found[Any]]:
        return self.tier.find(keys)

    def read(self, found: Found[Any], timeout_s: float) -> np.ndarray:
        return self.tier.read(found, timeout_s)

    def memory(self) -> Sequence[range]:
        return ()
