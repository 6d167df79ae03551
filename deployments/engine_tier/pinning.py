"""Pins the memory of the tier's objects on this node, as it is written to, so that a GPU reads them where they are.

What is not pinned yet is copied through memory of the engine's own. Pages that nobody wrote to are left alone: pinning
would give them memory. What is pinned has its memory already, and Ray's object store does not give that back.
"""

import logging
import time
from threading import Event, Thread

from deployments.engine.kv.pinned import PinnedMemory
from deployments.errors import PinError
from deployments.kv_tier.mapped import is_written
from deployments.kv_tier.store import TierStore

logger = logging.getLogger(__name__)

# Pinned at once: the driver keeps launches waiting meanwhile.
PIECE_BYTES = 16 << 20
# Share of the time in which something is pinned, and in which the pages are looked through.
_PINNING_SHARE = 0.2
_LOOKING_SHARE = 0.01
_BEAT_S = 1.0


class Pinner:
    """See the module.

    Args:
        pinned: of the engine.
        store: the tier.
        idle: set while nothing is fetched: what is pinned meanwhile would keep a fetch waiting.
    """

    def __init__(self, pinned: PinnedMemory, store: TierStore, idle: Event) -> None:
        self._pinned = pinned
        self._idle = idle
        self._store = store
        self._done: set[int] = set()
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="tier-pin", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Pin nothing more, and let go of all; nothing is fetched any more."""
        self._stopped.set()
        self._idle.set()
        self._thread.join()
        self._pinned.unpin()

    def _run(self) -> None:
        rest_s = 0.0
        while not self._stopped.wait(rest_s):
            begun_s = time.monotonic()
            fresh = self._find()
            rest_s = max(_BEAT_S, (time.monotonic() - begun_s) / _LOOKING_SHARE)
            try:
                for piece in fresh:
                    self._pin(piece)
            except PinError as error:
                logger.warning("the tier's objects are copied twice, for their memory cannot be pinned: %s", error)
                return

    def _find(self) -> list[range]:
        """Pieces that were written to and are not pinned."""
        pieces = [
            region[start : start + PIECE_BYTES]
            for region in self._store.memory()
            for start in range(0, len(region), PIECE_BYTES)
        ]
        return [piece for piece in pieces if piece.start not in self._done and is_written(piece.start)]

    def _pin(self, piece: range) -> None:
        self._idle.wait()
        if self._stopped.is_set():
            return
        begun_s = time.monotonic()
        self._pinned.pin(piece.start, len(piece))
        self._done.add(piece.start)
        self._stopped.wait((time.monotonic() - begun_s) * (1 / _PINNING_SHARE - 1))
