"""An engine at work: the loop it runs in, the way its tokens take, and what its front is told of its requests.

The same for an engine in an actor (`EngineActor`) and one in the front's own process (`LocalEngine`). Knows no Ray. Its
methods may be called from any thread; some wait for the loop.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.handoff.completions import Completions
from deployments.engine.handoff.outbox import TakenHandoff
from deployments.engine.loop import EngineLoop
from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats
from deployments.engine_builder import BuiltEngine
from deployments.engine_tier.tier import EngineTier
from deployments.errors import KvRelayError, TransferError
from deployments.filling import Filling
from deployments.kv_tier.index import Origins
from deployments.kv_tier.keys import TierKeys
from deployments.kv_tier.store import TierStore
from deployments.messages import (
    ChunkReady,
    Ended,
    EngineEvent,
    FrontEvent,
    GenerateRequest,
    GivenUp,
    HandoffExpired,
    HandoffOpened,
    Placed,
    ReplyAddress,
    TokenOutput,
)
from deployments.receipts import Timed
from deployments.tokens.sender import TokenSender

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

T = TypeVar("T")

_EXPIRED = "the decode engine was not heard of within the lease"


class EngineHost:
    """See the module; what the methods do is said at `EngineHandle`.

    Args:
        built: the engine.
        tell: called with what happens to requests, tokens apart: those go where each request says. From the loop's
            thread and from the sender's; must not block.
    """

    def __init__(self, built: BuiltEngine, tell: Callable[[list[FrontEvent]], None]) -> None:
        self.info = built.info
        self._engine = built.engine
        self._tell = tell
        self._tokens = TokenSender(self._give_up)
        self._loop = EngineLoop(self._engine, self._emit)
        self._imports = Completions()
        self._engine.when_released(partial(self._loop.submit, _look))
        self._tier: EngineTier | None = None
        self._is_flipped = False

    def use_tier(self, store: TierStore, keys: TierKeys, copy_share: float) -> None:
        """From now on give KV to the tier and take it from there; before the first request."""
        self.info = replace(self.info, has_tier=True)
        self._tier = EngineTier(self._engine, self._loop, store, keys, self.info.positions, copy_share)

    def ping(self) -> None:
        self._loop.call(lambda engine: engine.run_canary())

    def stats(self) -> EngineStats:
        return self._complete(self._loop.call(lambda engine: engine.stats()))

    def report(self, read: Position | None) -> tuple[EngineStats, CacheEvents]:
        stats, changes = self._loop.call(lambda engine: (engine.stats(), engine.cache_changes(read)))
        return self._complete(stats), changes

    def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> None:
        self._engine.check(request)
        self._tokens.register(request.request_id, reply_to)
        self._enter(request, lambda engine: engine.add(request, remote_threshold))

    def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> None:
        self._engine.check(request)
        self._tokens.register(request.request_id, reply_to)
        self._enter(request, partial(self._open_handoff, request, first_block))

    def prefill_locally(self, request_id: str) -> None:
        self._post(lambda engine: engine.prefill_locally(request_id))

    def renew(self, request_id: str) -> bool:
        """An engine whose loop hangs does not answer."""
        waits = self._tier is not None and self._tier.holds(request_id)
        return self._loop.call(lambda engine: engine.renew(request_id)) or waits

    def abort(self, request_id: str) -> None:
        self._tokens.forget(request_id)
        if self._tier is not None:
            self._tier.forget(request_id)
        self._post(lambda engine: engine.abort(request_id))

    def take_handoff(self, request_id: str) -> TakenHandoff:
        """What is computed for another engine, complete or not.

        Raises:
            TransferError: it is gone, since the request was aborted.
        """
        handoff = self._engine.take_handoff(request_id)
        if handoff is None:
            raise TransferError(f"{request_id}: the hand-off is gone")
        return handoff

    def filling(self, release: Callable[[int], None]) -> Filling:
        """Take a hand-off into the pool, part by part; `release` is told of each chunk that is in it."""
        return Filling(self._loop, self.import_chunk, self._imports, release)

    def give(self, key: bytes) -> "tuple[Origins, np.ndarray] | None":
        """See `EngineTier.give`."""
        return self._tier.give(key) if self._tier is not None else None

    def take_role(self, is_flipped: bool) -> None:
        """From now on say so, see `EngineStats.is_flipped`: whoever sends requests goes by it. Nothing else changes."""
        if is_flipped != self._is_flipped:
            logger.info("this engine %s", "computes prompts for others now" if is_flipped else "decodes again")
        self._is_flipped = is_flipped

    def submit(self, command: Callable[[Engine], T]) -> "Future[T]":
        """Have anything else done between two steps."""
        return self._loop.submit(command)

    def stop(self) -> None:
        """End the loop, and send what is left of the tokens."""
        if self._tier is not None:
            self._tier.stop()
        self._loop.stop()
        self._tokens.stop()

    def import_chunk(self, chunk: ChunkReady, tensor: Tensor, engine: Engine) -> "torch.cuda.Event | None":
        """Called in the loop's thread. What comes back happens when the device has read the tensor."""
        self._loop.emit(engine.import_chunk(chunk, tensor))
        return engine.imported()

    def _complete(self, stats: EngineStats) -> EngineStats:
        """With what the engine does not know of itself."""
        stats.num_receivers = self._tokens.num_channels
        stats.is_flipped = self._is_flipped
        if self._tier is not None:
            self._tier.add_to(stats)
        return stats

    def _open_handoff(self, request: GenerateRequest, first_block: int, engine: Engine) -> None:
        """The front can take it, and pass it on, before the prompt is computed."""
        engine.prefill(request, first_block)
        self._tell([HandoffOpened(request.request_id)])

    def _enter(self, request: GenerateRequest, command: Callable[[Engine], object]) -> None:
        """Have the loop take a request, once the tier has brought what it has of the prompt."""
        if self._tier is None:
            self._post(command)
        else:
            self._tier.bring(request, partial(self._post, command))

    def _emit(self, events: list[EngineEvent]) -> None:
        """Share out what a step made; called in the loop's thread."""
        outputs = [event for event in events if isinstance(event, TokenOutput)]
        if outputs:
            self._tokens.send(outputs)
        losses: dict[str, KvRelayError | None] = {o.request_id: None for o in outputs if o.finish_reason is not None}
        losses |= {e.request_id: _lost(e.request_id, _EXPIRED) for e in events if isinstance(e, HandoffExpired)}
        losses |= {event.request_id: event.error for event in events if isinstance(event, GivenUp)}
        self._tell_front([event for event in events if isinstance(event, Placed | Timed)], losses)

    def _give_up(self, request_id: str, reason: str) -> None:
        """End a request whose tokens nobody takes; called in the sender's thread."""
        self._post(lambda engine: engine.abort(request_id))
        self._tell_front([], {request_id: _lost(request_id, reason)})

    def _tell_front(self, events: list[Placed | Timed], losses: Mapping[str, KvRelayError | None]) -> None:
        """What happened, and which requests have ended: with all of their tokens sent, or why not."""
        told: list[FrontEvent] = [*events, *(Ended(request_id, loss) for request_id, loss in losses.items())]
        if told:
            self._tell(told)

    def _post(self, command: Callable[[Engine], object]) -> None:
        """Have the loop carry out a command whose result nobody waits for; a failure is at least logged."""
        self._loop.submit(command).add_done_callback(_log_failure)


def _look(engine: Engine) -> None:
    """Nothing: behind a command the loop looks whether there is work."""


def _lost(request_id: str, reason: str) -> TransferError:
    return TransferError(f"{request_id}: {reason}")


def _log_failure(command: "Future[object]") -> None:
    if error := command.exception():
        logger.error("a command failed in the engine", exc_info=error)
