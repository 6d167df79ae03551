"""Holds a request back while the tier may have its prompt, and lets it enter the engine then, whatever came of it.

The request waits, the batch does not: the engine has not heard of it yet. What was fetched is in the prefix cache when
the engine looks there; what was not is computed.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock

import numpy as np

from deployments.engine.engine import Engine
from deployments.engine.scheduling.block_hash import hash_chain, root_of
from deployments.engine.scheduling.ids import token_array
from deployments.engine.scheduling.positions import PositionRule
from deployments.engine.stats import EngineStats
from deployments.engine_tier.fetching import Fetcher
from deployments.engine_tier.giving import Giver
from deployments.engine_tier.loop import Loop
from deployments.engine_tier.pinning import Pinner
from deployments.errors import EngineDeadError, TierError
from deployments.kv_tier.index import Origins
from deployments.kv_tier.keys import TierKeys, shard_of
from deployments.kv_tier.store import TierStore
from deployments.messages import GenerateRequest

logger = logging.getLogger(__name__)

# Requests that fetch at once. Those that lack the same take turns, so that the second one finds it cached.
_NUM_TURNS = 4


class EngineTier:
    """See the module.

    Args:
        engine: whose cache it is.
        loop: that it runs in.
        store: the tier.
        keys: of the engine's KV.
        positions: of its model.
        copy_share: see `TierSettings`.
    """

    def __init__(
        self, engine: Engine, loop: Loop, store: TierStore, keys: TierKeys, positions: PositionRule, copy_share: float
    ) -> None:
        self._lending = engine.lending
        self._keys = keys
        self._positions = positions
        self._giver = Giver(engine, loop, store, keys, copy_share)
        self._fetcher = Fetcher(engine.lending, loop, store, keys)
        pinned = engine.lending.pinned
        self._pinner = Pinner(pinned, store, self._fetcher.idle) if pinned is not None else None
        self._turns = [ThreadPoolExecutor(1, thread_name_prefix="tier-fetch") for _ in range(_NUM_TURNS)]
        self._lock = Lock()
        self._waiting: set[str] = set()

    def bring(self, request: GenerateRequest, enter: Callable[[], None]) -> None:
        """Let a request enter the engine: at once, or when the tier has brought what it has of the prompt.

        Args:
            request: that the engine has not heard of yet.
            enter: has the engine take it; called once, unless the request is forgotten before.
        """
        chain = self._chain(request)
        self._giver.offer_again(chain[: self._lending.num_cached(chain)])
        num_cached = self._lending.num_usable(chain)
        if not self._fetcher.asks((len(chain) - num_cached) * self._keys.block_size):
            enter()
            return
        with self._lock:
            self._waiting.add(request.request_id)
        size = self._keys.num_blocks
        turn = shard_of(self._keys.of(chain[(num_cached // size + 1) * size - 1]), _NUM_TURNS)
        try:
            self._turns[turn].submit(self._bring, request.request_id, chain, enter)
        except RuntimeError:  # it was stopped
            self._enter(request.request_id, enter)

    def forget(self, request_id: str) -> None:
        """The request is over: it enters no more. Unknown ids are no error."""
        with self._lock:
            self._waiting.discard(request_id)

    def holds(self, request_id: str) -> bool:
        """Whether the request waits here."""
        return request_id in self._waiting

    def give(self, key: bytes) -> tuple[Origins, np.ndarray] | None:
        """See `Giver.give`."""
        return self._giver.give(key)

    def add_to(self, stats: EngineStats) -> None:
        """What the engine does not know of itself; and what it has to compute is noted here."""
        self._fetcher.num_queued = stats.num_queued_prompt_tokens - stats.num_remote_prompt_tokens
        stats.num_waiting += len(self._waiting)
        stats.tier_hit_tokens = self._lending.num_hit_tokens
        stats.tier_fetched_bytes, stats.tier_fetch_s = self._fetcher.num_bytes, self._fetcher.seconds
        stats.tier_failures, stats.tier_given_bytes = self._fetcher.num_failures, self._giver.num_bytes
        tier = self._giver.tier
        stats.tier_bytes, stats.tier_objects, stats.tier_evictions = tier.num_bytes, tier.num_objects, tier.num_evicted

    def stop(self) -> None:
        """Give and fetch nothing more. The loop still runs, or has ended."""
        for turn in self._turns:
            turn.shutdown()
        self._fetcher.stop()
        if self._pinner is not None:
            self._pinner.stop()
        self._giver.stop()

    def _chain(self, request: GenerateRequest) -> list[bytes]:
        """Hashes of the prompt's blocks in whole objects, without that of its last token, which is always computed."""
        block_size, size = self._keys.block_size, self._keys.num_blocks
        num_blocks = (request.num_given_tokens - 1) // block_size // size * size
        if not num_blocks or request.num_prompt_logprobs is not None:
            return []
        offset = self._positions.offset(len(request.prompt_token_ids), request.num_given_tokens)
        token_ids = token_array(request.given_token_ids[: num_blocks * block_size])
        return hash_chain(root_of(offset, request.cache_salt), token_ids, block_size)

    def _bring(self, request_id: str, chain: list[bytes], enter: Callable[[], None]) -> None:
        """Fetch what there is, whatever becomes of it, and let the request enter: before another step, if it can."""
        enters = partial(self._enter, request_id, enter)
        try:
            if self.holds(request_id):
                self._fetcher.fetch(chain, enters)
        except TierError as error:
            self._fetcher.note_failure(error)
        except EngineDeadError as error:
            logger.info("%s: %s", request_id, error)
        except Exception:
            logger.exception("%s: the tier could not be used", request_id)
        finally:
            enters()

    def _enter(self, request_id: str, enter: Callable[[], None]) -> None:
        """Let a request enter that still waits: once, whoever asks."""
        with self._lock:  # an abort comes before or after as a whole
            if request_id in self._waiting:
                self._waiting.remove(request_id)
                enter()
