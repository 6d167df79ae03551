"""An engine at work: the loop it runs in, the way its tokens take, and what its front is told of its requests.

The same for an engine in an actor (`EngineActor`) and one in the front's own process (`LocalEngine`). Knows no Ray. Its
methods may be called from any thread; some wait for the loop.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.handoff.outbox import TakenChunk
from deployments.engine.loop import EngineLoop
from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats
from deployments.engine_builder import BuiltEngine
from deployments.engine_tier.tier import EngineTier
from deployments.errors import KvRelayError, TransferError
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

# A chunk that is imported waits for the step in progress; a step longer than this means that the engine hangs.
_IMPORT_TIMEOUT_S = 60.0
_EXPIRED = "the decode engine was not heard of within the lease"


class _Part(NamedTuple):
    chunk: ChunkReady
    tensor: Tensor
    complete_s: float


class Filling:
    """One chunk's way into the pool: each part between two steps, with all that are there by then.

    Left by an exception, it takes nothing more: the parts may lie in memory that the source gives to others then.

    Args:
        loop: of the engine.
        import_chunk: called in the loop's thread, see `EngineHost.import_chunk`.
    """

    def __init__(
        self, loop: EngineLoop, import_chunk: "Callable[[ChunkReady, Tensor, Engine], torch.cuda.Event | None]"
    ) -> None:
        self._loop = loop
        self._import_chunk = import_chunk
        self._parts: deque[_Part] = deque()
        self._commands: list[Future[torch.cuda.Event | None]] = []
        self._kept: list[Tensor] = []
        self._seconds = self._until_s = 0.0

    def add(self, chunk: ChunkReady, tensor: Tensor, complete_s: float, keeps: bool = True) -> None:
        """Take a part.

        Args:
            chunk: what it is.
            tensor: its KV.
            complete_s: when it was, monotonic.
            keeps: it is kept until the device has read all of the chunk. A part that was sent is not: the memory is
                owed to parts of other chunks, without which this chunk's next part may not come (`KVCopies.import_`).
        """
        if keeps:
            self._kept.append(tensor)
        self._parts.append(_Part(chunk, tensor, complete_s))
        self._commands.append(self._loop.submit(self._take_in))

    def finish(self) -> float:
        """Wait until the device has read all; seconds in which some part was there and not yet in the pool.

        Raises:
            ValueError: see `Engine.import_chunk`.
        """
        for command in self._commands:
            if (imported := command.result(_IMPORT_TIMEOUT_S)) is not None:
                imported.synchronize()
        return self._seconds + time.monotonic() - self._until_s

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            return
        for command in [command for command in self._commands if not command.cancel()]:
            with suppress(Exception):
                if (imported := command.result(_IMPORT_TIMEOUT_S)) is not None:
                    imported.synchronize()

    def _take_in(self, engine: Engine) -> "torch.cuda.Event | None":
        imported = None
        for part in _joined(self._parts):
            imported = self._import_chunk(part.chunk, part.tensor, engine)
            now_s = time.monotonic()
            self._seconds += now_s - max(part.complete_s, self._until_s)
            self._until_s = now_s
        return imported


def _joined(parts: deque[_Part]) -> Iterator[_Part]:
    """Take all that are there, those as one that lie behind each other in memory: each import costs a launch."""
    while parts:
        part = parts.popleft()
        while parts and part.chunk.layers and _follows(parts[0].tensor, part.tensor):
            first, after = part, parts.popleft()
            assert first.chunk.layers is not None and after.chunk.layers is not None
            layers = first.chunk.layers[0], after.chunk.layers[1]
            shape = (layers[1] - layers[0], *first.tensor.shape[1:])
            part = _Part(
                replace(after.chunk, layers=layers),
                first.tensor.as_strided(shape, first.tensor.stride()),
                first.complete_s,
            )
        yield part


def _follows(tensor: Tensor, before: Tensor) -> bool:
    return (
        tensor.data_ptr() == before.data_ptr() + before.nbytes
        and tensor.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    )


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
        self._enter(request, lambda engine: engine.prefill(request, first_block))

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

    def take_chunk(self, request_id: str, index: int) -> TakenChunk:
        """A chunk, complete or not.

        Raises:
            TransferError: the chunk is gone, since the request was aborted.
        """
        chunk = self._engine.take_chunk(request_id, index)
        if chunk is None:
            raise TransferError(f"{request_id}: chunk {index} is gone")
        return chunk

    def filling(self) -> "Filling":
        """Take a chunk into the pool, whole or part by part."""
        return Filling(self._loop, self.import_chunk)

    def release_chunk(self, request_id: str, index: int) -> None:
        self._post(lambda engine: engine.release_chunk(request_id, index))

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
        return engine.fence()

    def _complete(self, stats: EngineStats) -> EngineStats:
        """With what the engine does not know of itself."""
        stats.num_receivers = self._tokens.num_channels
        stats.is_flipped = self._is_flipped
        if self._tier is not None:
            self._tier.add_to(stats)
        return stats

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
        self._tell_front([event for event in events if isinstance(event, Placed | ChunkReady | Timed)], losses)

    def _give_up(self, request_id: str, reason: str) -> None:
        """End a request whose tokens nobody takes; called in the sender's thread."""
        self._post(lambda engine: engine.abort(request_id))
        self._tell_front([], {request_id: _lost(request_id, reason)})

    def _tell_front(self, events: list[Placed | ChunkReady | Timed], losses: Mapping[str, KvRelayError | None]) -> None:
        """What happened, and which requests have ended: with all of their tokens sent, or why not."""
        told: list[FrontEvent] = [*events, *(Ended(request_id, loss) for request_id, loss in losses.items())]
        if told:
            self._tell(told)

    def _post(self, command: Callable[[Engine], object]) -> None:
        """Have the loop carry out a command whose result nobody waits for; a failure is at least logged."""
        self._loop.submit(command).add_done_callback(_log_failure)


def _lost(request_id: str, reason: str) -> TransferError:
    return TransferError(f"{request_id}: {reason}")


def _log_failure(command: "Future[object]") -> None:
    if error := command.exception():
        logger.error("a command failed in the engine", exc_info=error)
