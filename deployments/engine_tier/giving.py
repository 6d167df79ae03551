"""What of an engine's cache is offered to the tier, and given when the tier asks for it.

Full blocks are offered as they become findable, and those of a prompt that is found here again from time to time: the
tier may have lost it, or take it for unused. What is given is copied beside the steps, and no more of it than leaves
them their time.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Lock, Thread

import numpy as np

from deployments.engine.engine import Engine
from deployments.engine.lending import Loan, Stretch
from deployments.engine_tier.loop import Loop
from deployments.errors import TierError, brief
from deployments.kv_tier.index import Offer, Origins, TierCounts
from deployments.kv_tier.keys import TierKeys
from deployments.kv_tier.policy import pause_after
from deployments.kv_tier.store import TierStore

logger = logging.getLogger(__name__)

# Offers that come so soon after each other go together: those of a step.
_GATHER_S = 0.02
# An engine without offers says so often that it lives.
_BEAT_S = 10.0
# While nobody hears them, offers are told again so often, and no more of them are kept.
_RETRY_S = 1.0
_MAX_KEPT = 4096
# A prompt that is found again is offered again no sooner.
_OFFERED_FOR_S = 60.0
# A copy out of the pool is followed by one of the same size into the store.
_COPIES = 2.0
# Between two looks whether an engine still has work.
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class _Offered:
    stretch: Stretch
    at_s: float


class Giver:
    """See the module.

    Args:
        engine: whose cache it is; its sequences are counted from other threads.
        loop: that it runs in.
        store: the tier.
        keys: of the engine's KV.
        copy_share: see `TierSettings`.
    """

    def __init__(self, engine: Engine, loop: Loop, store: TierStore, keys: TierKeys, copy_share: float) -> None:
        self._engine = engine
        self._lending = engine.lending
        self._loop = loop
        self._store = store
        self._keys = keys
        self._copy_share = copy_share
        # Twice what the pool holds: what was offered before that is cached no more.
        self._max_offered = 2 * engine.limits.num_blocks // keys.num_blocks + 1
        self._lock = Lock()  # of what was offered and what is to be offered again
        self._offered: OrderedDict[bytes, _Offered] = OrderedDict()
        self._again: list[Stretch] = []
        self._rest_until_s = 0.0
        self.num_bytes = 0
        self.tier = TierCounts()  # what it had when this engine last offered something, or said that it lives
        self._buffer = np.empty((keys.num_blocks, self._lending.bytes_per_block), np.uint8)
        self._stopped = Event()
        self._lending.watch(keys.num_blocks)
        self._offerer = Thread(target=self._offer, name="tier-offer", daemon=True)
        self._offerer.start()

    def offer_again(self, chain: Sequence[bytes]) -> None:
        """These blocks of a prompt were found: offer what was not offered lately. Does not wait."""
        size, too_old_s = self._keys.num_blocks, time.monotonic() - _OFFERED_FOR_S
        with self._lock:
            for end in range(size, len(chain) + 1, size):
                offered = self._offered.get(self._keys.of(chain[end - 1]))
                if offered is None or offered.at_s < too_old_s:
                    self._again.append(Stretch(tuple(chain[end - size : end]), end))
            if self._again:
                self._lending.has_fresh.set()

    def give(self, key: bytes) -> tuple[Origins, np.ndarray] | None:
        """An object that was offered; None if it is gone. Its bytes are valid until the next one is given.

        Not called twice at once. Waits for as long as copies have to rest.
        """
        with self._lock:
            offered = self._offered.get(key)
        if offered is None:
            return None
        self._rest()
        lent = self._loop.call(lambda engine: _lend(engine, offered.stretch))
        if lent is None:
            return None
        loan, origins = lent
        try:
            taken_s = self._lending.copy_out(loan, self._buffer)
        finally:
            self._loop.submit(lambda engine: engine.lending.give_back(loan))  # whenever a step ends: nobody waits
        self._rest_until_s = time.monotonic() + pause_after(_COPIES * taken_s, self._copy_share)
        self.num_bytes += self._buffer.nbytes
        return origins, self._buffer

    def stop(self) -> None:
        """Offer nothing more."""
        self._lending.unwatch()
        self._stopped.set()
        self._lending.has_fresh.set()
        self._offerer.join()

    def _offer(self) -> None:
        """The offering thread."""
        while not self._stopped.is_set():
            self._lending.has_fresh.wait(_BEAT_S)
            if self._stopped.wait(_GATHER_S):
                return
            offers = self._next_offers()
            try:
                self.tier = self._store.offer(offers)
            except TierError as error:
                logger.warning("nothing is offered to the tier: %s", brief(error))
                self._keep_for_later(offers)
                self._stopped.wait(_RETRY_S)

    def _keep_for_later(self, offers: Sequence[Offer]) -> None:
        """Nobody has heard of these; the newest are told again."""
        with self._lock:
            self._again += [self._offered[offer.key].stretch for offer in offers if offer.key in self._offered]
            del self._again[:-_MAX_KEPT]
        self._lending.has_fresh.set()

    def _next_offers(self) -> list[Offer]:
        """What has become findable, and what was found again; from now on it can be given."""
        stretches, now_s = self._lending.take_fresh(), time.monotonic()
        with self._lock:
            stretches += self._again
            self._again = []
            named = {self._keys.of(stretch.hashes[-1]): stretch for stretch in stretches}
            for key, stretch in named.items():
                self._offered[key] = _Offered(stretch, now_s)
                self._offered.move_to_end(key)
            while len(self._offered) > self._max_offered:
                self._offered.popitem(last=False)
        return [Offer(key, self._keys.num_bytes, stretch.end) for key, stretch in named.items()]

    def _rest(self) -> None:
        """Wait until copies may take time again; an engine without work is in nobody's way."""
        while time.monotonic() < self._rest_until_s and self._engine.num_sequences and not self._stopped.is_set():
            time.sleep(_LOOK_S)


def _lend(engine: Engine, stretch: Stretch) -> tuple[Loan, Origins] | None:
    loan = engine.lending.lend(stretch.hashes)
    return None if loan is None else (loan, engine.lending.origins(loan))
