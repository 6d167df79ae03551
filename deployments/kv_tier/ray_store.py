"""The tier in Ray: bytes in its object store, which spills to disk, and an index in actors that own them.

The index calls an engine for what it wants of an offer. In Ray an object belongs to whoever called for it: so it
outlives its engine, and dies with the index. Ray restarts an index that dies, empty. It belongs to no engine, so it
ends itself when none has been heard of for long. The one file of this room that knows Ray.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from deployments.errors import TierError, brief
from deployments.kv_tier.index import Found, Offer, Origins, TierCounts, TierIndex
from deployments.kv_tier.keys import shard_of
from deployments.kv_tier.mapped import mappings
from deployments.kv_tier.settings import TierSettings
from deployments.kv_tier.store import leading

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")
Answer = TypeVar("Answer")

# One namespace for all applications of a cluster.
_NAMESPACE = "kvrelay-tier"
# What a process has mapped of its node's object store, where this is shared memory.
_OBJECT_STORE = "/dev/shm/plasma"
_OFFER_TIMEOUT_S = 10.0
# Without a word from any engine for so long an index ends itself; longer than engines take to be replaced.
_LINGER_S = 600.0


class RemoteMethod(Protocol[P, Answer]):
    """A method of an actor, called through the actor's handle."""

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> "ObjectRef[Answer]": ...


class Give(Protocol):
    """`EngineActor.give`, called likewise; each of its results is an object of its own."""

    def options(self, *, num_returns: int) -> "Give": ...

    def remote(self, key: bytes) -> "list[ObjectRef[Any]]": ...


class GivingEngine(Protocol):
    """An engine's actor, as the index sees it."""

    @property
    def give(self) -> Give: ...


class IndexShard(Protocol):
    """An `IndexActor`, as those see it that ask it."""

    @property
    def offer(self) -> RemoteMethod[[GivingEngine, Sequence[Offer]], TierCounts]: ...

    @property
    def find(self) -> RemoteMethod[[Sequence[bytes]], list[Found[Any]]]: ...

    @property
    def lose(self) -> RemoteMethod[[Sequence[bytes]], None]: ...

    @property
    def counts(self) -> RemoteMethod[[], TierCounts]: ...

    @property
    def clear(self) -> RemoteMethod[[], None]: ...


class IndexActor:
    """A shard of the index. Its methods run in one event loop, so that none sees another half done.

    Args:
        max_bytes: of this shard.
        linger_s: see `_LINGER_S`.
    """

    def __init__(self, max_bytes: int, linger_s: float = _LINGER_S) -> None:
        self._index = TierIndex["ObjectRef[np.ndarray]"](max_bytes)
        self._linger_s = linger_s
        self._heard_s = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._end_alone())

    async def offer(self, engine: GivingEngine, offers: Sequence[Offer]) -> TierCounts:
        """An engine could give these; what is wanted is asked for, and comes later. Tells what is there now."""
        self._heard_s = time.monotonic()
        for offer in self._index.accept(offers, self._heard_s):
            self._start(self._collect(engine, offer))
        return self._index.counts()

    async def find(self, keys: Sequence[bytes]) -> list[Found[Any]]:
        """Those of these objects that are there."""
        self._heard_s = time.monotonic()
        return self._index.find(keys, self._heard_s)

    async def lose(self, keys: Sequence[bytes]) -> None:
        """Somebody could not read these."""
        self._index.lose(keys)

    async def counts(self) -> TierCounts:
        """What is there; asserts that nothing is counted twice."""
        self._index.check_integrity()
        return self._index.counts()

    async def clear(self) -> None:
        """Give all up that is there."""
        self._index.clear()

    async def _collect(self, engine: GivingEngine, offer: Offer) -> None:
        try:
            # Two results: to wait for the bytes themselves would bring them to this process's node.
            refs = engine.give.options(num_returns=2).remote(offer.key)
            origins: Origins | None = await refs[0]
        except RayError as error:
            logger.info("an engine gives nothing of what it has offered: %s", brief(error))
            origins = None
        if origins is None:
            self._index.give_up(offer)
        else:
            self._index.store(offer, origins, refs[1], time.monotonic())

    async def _end_alone(self) -> None:
        left_s = self._linger_s
        while left_s > 0:
            await asyncio.sleep(left_s)
            left_s = self._heard_s + self._linger_s - time.monotonic()
        logger.info("no engine was heard of for %.0f s: this part of the tier ends", self._linger_s)
        ray.kill(ray.get_runtime_context().current_actor)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def shards(settings: TierSettings) -> list[IndexShard]:
    """The parts of the index; those that are not there yet are started."""
    actor_class: Any = ray.remote(IndexActor)
    options: dict[str, Any] = {
        "namespace": _NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",  # it shall outlive the engine that starts it
        "max_restarts": -1,
        "num_cpus": 0,
        "max_concurrency": 1000,
        # Somewhere, and not in the placement group of the engine that starts it.
        "scheduling_strategy": "SPREAD",
    }
    per_shard = settings.max_bytes // settings.num_shards
    return [
        actor_class.options(name=f"{settings.name}-{number}-of-{settings.num_shards}", **options).remote(per_shard)
        for number in range(settings.num_shards)
    ]


def counts_of(settings: TierSettings) -> list[TierCounts]:
    """What each part of the index has; for tests and benchmarks."""
    counts: list[TierCounts] = ray.get([shard.counts.remote() for shard in shards(settings)])
    return counts


def object_memory() -> list[range]:
    """Addresses at which this process has mapped its node's object store; none before its first large object."""
    return mappings(_OBJECT_STORE)


class RayStore:
    """The tier as an engine's actor sees it; see `TierStore`. Made in that actor.

    Args:
        settings: of the tier.
    """

    def __init__(self, settings: TierSettings) -> None:
        self._shards = shards(settings)
        self._engine = ray.get_runtime_context().current_actor

    def offer(self, offers: Sequence[Offer]) -> TierCounts:
        parts = self._split(offers, lambda offer: offer.key)
        counts = _get([shard.offer.remote(self._engine, part) for shard, part in parts], _OFFER_TIMEOUT_S)
        return sum(counts, TierCounts())

    def find(self, keys: Sequence[bytes], timeout_s: float) -> list[Found[Any]]:
        parts = [(shard, part) for shard, part in self._split(keys, bytes) if part]
        answers = _get([shard.find.remote(part) for shard, part in parts], timeout_s)
        return leading(keys, [found for answer in answers for found in answer])

    def read(self, found: Found[Any], timeout_s: float) -> np.ndarray:
        try:
            data: np.ndarray = ray.get(found.ref, timeout=timeout_s)
        except GetTimeoutError:
            raise TierError(f"{found.num_bytes} bytes did not come within {timeout_s:.2f} s") from None
        except RayError as error:
            self._shards[shard_of(found.key, len(self._shards))].lose.remote([found.key])
            raise TierError(f"an object is lost: {brief(error)}") from error
        return data

    def memory(self) -> Sequence[range]:
        return object_memory()

    def _split(self, items: Sequence[T], key: Callable[[T], bytes]) -> list[tuple[IndexShard, list[T]]]:
        parts: list[list[T]] = [[] for _ in self._shards]
        for item in items:
            parts[shard_of(key(item), len(parts))].append(item)
        return list(zip(self._shards, parts, strict=True))


def _get(refs: "list[ObjectRef[Any]]", timeout_s: float) -> list[Any]:
    try:
        answers: list[Any] = ray.get(refs, timeout=timeout_s)
    except GetTimeoutError:
        raise TierError(f"the index has not answered within {timeout_s:g} s") from None
    except RayError as error:
        raise TierError(f"the index is gone: {brief(error)}") from error
    return answers
