"""What a front asks of an engine, in whatever process that lives: its own, or the one at the other end of a hand-off.

Two kinds: `RayEngine` asks an actor, `LocalEngine` (local_engine.py) an engine in this process.
"""

import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats
from deployments.engine_info import EngineInfo
from deployments.messages import FrontEvent, GenerateRequest, ReplyAddress
from deployments.receipts import ChunkArrived

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from deployments.engine.handoff.outbox import TakenHandoff


class EngineHandle(Protocol):
    """An engine.

    Each method asks before it returns, and never waits: what comes back is there to wait for. Whoever is cancelled
    meanwhile leaves what was asked going on. Two questions may overtake each other, unless one's answer is an argument
    of the other. From an engine that is gone no answer comes but an error.
    """

    def info(self) -> Awaitable[EngineInfo]:
        """What it says of itself, once it is loaded."""
        ...

    def ping(self) -> Awaitable[None]:
        """Its loop has turned and its model has run a token; raises what is wrong with either."""
        ...

    def stats(self) -> Awaitable[EngineStats]: ...

    def report(self, read: Position | None) -> Awaitable[tuple[EngineStats, CacheEvents]]:
        """Its numbers, and what changed in its prefix cache since somebody has read of it; None: all that is there."""
        ...

    def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> Awaitable[None]:
        """Queue a request to decode there; see `Engine.add`. Its tokens go to `reply_to`."""
        ...

    def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> Awaitable[None]:
        """Queue a prompt to compute for another engine; see `Engine.prefill`. Its first token goes to `reply_to`."""
        ...

    def prefill_locally(self, request_id: str) -> Awaitable[None]:
        """See `Engine.prefill_locally`."""
        ...

    def renew(self, request_id: str) -> Awaitable[bool]:
        """The other engine of a hand-off lives: its lease begins anew. False: nothing is held for it there."""
        ...

    def abort(self, request_id: str, admission: Awaitable[None]) -> Awaitable[None]:
        """End a request; `admission` is what its `add` or `prefill` returned, so that it cannot come later."""
        ...

    def take_handoff(self, request_id: str) -> "Awaitable[TakenHandoff]":
        """All of a prompt that is computed there, complete or not, to be passed on to `receive_kv` of another engine.

        It is given away once, from `HandoffOpened` on. Its chunks stay for as long as this, or until they are released.
        """
        ...

    def receive_kv(self, request_id: str, handoff: "Awaitable[TakenHandoff]") -> Awaitable[list[ChunkArrived]]:
        """Take a prompt into the pool, chunk by chunk as they are complete, and release each chunk at its source.

        Returns:
            All chunks, once they are in the pool and their memory at the source is read no more.
        """
        ...

    def events(self) -> AsyncIterator[list[FrontEvent]]:
        """What happens to the requests, some events at a time; for one reader. Raises when the engine is gone."""
        ...


class RayEngine:
    """An engine behind an actor's handle; see `EngineHandle`. It may be sent to other processes.

    Args:
        actor: an `EngineActor`.
    """

    # Any: whatever the parameter, Ray types all methods of a handle as Never. The methods below give them their types.
    def __init__(self, actor: "ActorHandle[Any]") -> None:
        self._actor = actor

    def info(self) -> Awaitable[EngineInfo]:
        return _ask(self._actor.info.remote)

    def ping(self) -> Awaitable[None]:
        return _ask(self._actor.ping.remote)

    def stats(self) -> Awaitable[EngineStats]:
        return _ask(self._actor.stats.remote)

    def report(self, read: Position | None) -> Awaitable[tuple[EngineStats, CacheEvents]]:
        return _ask(self._actor.report.remote, read)

    def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> Awaitable[None]:
        return _ask(self._actor.add.remote, request, remote_threshold, reply_to)

    def prefill(self, request: GenerateRequest, first_block: int, reply_to: ReplyAddress) -> Awaitable[None]:
        return _ask(self._actor.prefill.remote, request, first_block, reply_to)

    def prefill_locally(self, request_id: str) -> Awaitable[None]:
        return _ask(self._actor.prefill_locally.remote, request_id)

    def renew(self, request_id: str) -> Awaitable[bool]:
        return _ask(self._actor.renew.remote, request_id)

    def abort(self, request_id: str, admission: Awaitable[None]) -> Awaitable[None]:
        return _ask(self._actor.abort.remote, request_id, admission)

    def take_handoff(self, request_id: str) -> "Awaitable[TakenHandoff]":
        return _ask(self._actor.take_handoff.remote, request_id)

    def receive_kv(self, request_id: str, handoff: "Awaitable[TakenHandoff]") -> Awaitable[list[ChunkArrived]]:
        return _ask(self._actor.receive_kv.remote, request_id, handoff)

    async def events(self) -> AsyncIterator[list[FrontEvent]]:
        async for answer in self._actor.events.options(num_returns="streaming").remote():
            yield await answer


def _ask(submit: Callable[..., Any], *arguments: object) -> Awaitable[Any]:
    """Submit a task to an actor, so that it outlives the request that it is submitted for.

    When a client leaves, Serve cancels the replica's task, and Ray with it every task submitted on its behalf: also the
    abort that is to free the request's blocks. Ray finds those by a context variable; here the context is empty.
    """
    answer: Awaitable[Any] = contextvars.Context().run(submit, *arguments)
    return answer
