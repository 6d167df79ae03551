"""Brings what the tier has of a prompt into an engine's prefix cache, if that is faster than to compute it.

Blocks are reserved between two steps, written beside them, and can be found from then on. An object that is gone, or
comes too late, ends the prompt that can be used; what came before it stays.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any

from deployments.engine.engine import Engine
from deployments.engine.lending import Lending, Loan
from deployments.engine_tier.loop import Loop
from deployments.errors import TierError, brief
from deployments.kv_tier.index import Found, Origins
from deployments.kv_tier.keys import TierKeys
from deployments.kv_tier.policy import FetchPolicy
from deployments.kv_tier.store import TierStore

logger = logging.getLogger(__name__)

_LOOKUP_TIMEOUT_S = 1.0


class Fetcher:
    """See the module. Safe from any thread but that of the engine, for whose steps it waits.

    Args:
        lending: of the engine.
        loop: that the engine runs in.
        store: the tier.
        keys: of the engine's KV.

    Attributes:
        num_queued: prompt tokens that the engine had to compute when it was last asked: they hide as much of a fetch.
        num_bytes: that were brought.
        seconds: that this took.
        num_failures: times that something did not come, or not in time.
        idle: set while nothing is copied.
    """

    def __init__(self, lending: Lending, loop: Loop, store: TierStore, keys: TierKeys) -> None:
        self._lending = lending
        self._loop = loop
        self._store = store
        self._keys = keys
        self._lock = Lock()  # of what was measured and counted
        self._policy = FetchPolicy()
        self._num_copying = 0
        self.idle = Event()
        self.idle.set()
        self._copiers = ThreadPoolExecutor(lending.num_lanes, thread_name_prefix="tier-copy")
        self.num_queued = 0
        self.num_bytes = 0
        self.seconds = 0.0
        self.num_failures = 0

    def asks(self, num_tokens: int) -> bool:
        """Whether to ask the tier for so many tokens; see `FetchPolicy.asks`."""
        with self._lock:
            self._policy.note_computed(*self._lending.prompt_costs)
            return not self._policy.rests(time.monotonic()) and self._policy.asks(num_tokens)

    def fetch(self, chain: list[bytes], done: Callable[[], None]) -> None:
        """Bring what is not cached of the leading blocks of a prompt; returns when it can be found, or is given up.

        Args:
            chain: hashes of the blocks, in whole objects.
            done: called between two steps as soon as what came can be found; not if nothing was to come.

        Raises:
            EngineDeadError: there are no more steps.
        """
        size = self._keys.num_blocks
        first = self._lending.num_usable(chain) // size  # more than when it came, perhaps: another one has fetched it
        found = self._find(self._keys.of_chain(chain)[first:])
        num_tokens, end = self._num_tokens(found), (first + len(found)) * size
        unread = self._lending.num_unread(end)
        found = found[max(0, unread // size - first) :]
        offset = end - len(found) * size  # of the first that is fetched
        with self._lock:
            num_bytes = len(found) * self._keys.num_bytes
            if not found or not self._policy.fetches(num_tokens, num_bytes, self.num_queued):
                return
            patience_s = self._policy.patience_s(self.num_queued + num_tokens)
        begun_s = time.monotonic()
        hashes = chain[min(unread, offset) : end]
        offset -= min(unread, offset)
        loan = self._loop.call(lambda engine: engine.lending.reserve(hashes))
        if loan is None:
            return  # no room: sequences that run need it more
        copying_s = time.monotonic()
        origins: list[str | None] = []
        try:
            # What the engine had when the tier was asked may be gone: nobody writes it, so nothing behind it counts.
            if loan.num_cached >= offset:
                with self._copying():
                    origins = self._copy_in(loan, offset, found, copying_s + patience_s)
        finally:
            copied_s = time.monotonic()
            self._loop.call(lambda engine: _end(engine, loan, origins, done))
            self._note(copying_s - begun_s, copied_s - copying_s, len(origins), loan)

    def note_failure(self, error: BaseException) -> None:
        """Something did not come, and is computed."""
        with self._lock:
            self.num_failures += 1
        logger.warning("the tier did not give what it has; it is computed: %s", brief(error))

    def stop(self) -> None:
        """Nothing is fetched any more."""
        self._copiers.shutdown()

    def _find(self, keys: list[bytes]) -> list[Found[Any]]:
        if not keys:
            return []
        begun_s = time.monotonic()
        with self._lock:
            if self._policy.rests(begun_s):
                return []  # since this request was held back others have asked in vain
        try:
            found = self._store.find(keys, _LOOKUP_TIMEOUT_S)
        except TierError:
            with self._lock:
                self._policy.note_silence(time.monotonic())
            raise
        lookup_s = time.monotonic() - begun_s
        with self._lock:
            self._policy.note_lookup(lookup_s, self._num_tokens(keys), self._num_tokens(found))
        return found

    def _num_tokens(self, objects: Sequence[object]) -> int:
        return len(objects) * self._keys.num_blocks * self._keys.block_size

    @contextmanager
    def _copying(self) -> Iterator[None]:
        self._count_copying(1)
        try:
            yield
        finally:
            self._count_copying(-1)

    def _count_copying(self, change: int) -> None:
        with self._lock:
            self._num_copying += change
            (self.idle.clear if self._num_copying else self.idle.set)()

    def _copy_in(self, loan: Loan, offset: int, found: Sequence[Found[Any]], until_s: float) -> list[str | None]:
        """Write objects into a loan's blocks from there on; the origins of what was not cached, up to the first gap."""
        starts = range(offset, len(loan.hashes), self._keys.num_blocks)
        copies = [
            self._copiers.submit(self._copy, loan, start, one, until_s)
            for start, one in zip(starts, found, strict=True)
        ]
        wait(copies)  # whatever fails: none may write to blocks that are given back
        origins: list[str | None] = []
        for copy in copies:
            if (error := copy.exception()) is not None:
                self.note_failure(error)
                break
            origins += copy.result()
        return origins

    def _copy(self, loan: Loan, start: int, one: Found[Any], until_s: float) -> Origins:
        """Write an object into the blocks from this one on; the origins of those that were not cached."""
        num_cached = max(0, loan.num_cached - start)
        if num_cached >= self._keys.num_blocks:
            return ()
        data = self._store.read(one, max(0.0, until_s - time.monotonic()))
        self._lending.copy_in(loan, start + num_cached, data[num_cached:])
        return one.origins[num_cached:]

    def _note(self, waited_s: float, seconds: float, num_blocks: int, loan: Loan) -> None:
        block_bytes = self._lending.bytes_per_block
        num_late = len(loan.hashes) - loan.num_cached - num_blocks
        with self._lock:
            self._policy.note_wait(waited_s)
            self._policy.note_fetch(seconds, num_blocks * block_bytes, num_late * block_bytes)
            self.num_bytes += num_blocks * block_bytes
            self.seconds += waited_s + seconds


def _end(engine: Engine, loan: Loan, origins: Sequence[str | None], done: Callable[[], None]) -> None:
    engine.lending.bring(loan, origins)
    engine.lending.give_back(loan)
    done()
