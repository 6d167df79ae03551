"""An engine actor whose tier is turned on and off while it runs, and which tells what its threads have cost."""

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from deployments.engine_actor import EngineActor
from deployments.engine_builder import BuiltEngine, build_engine
from deployments.engine_host import EngineHost
from deployments.kv_tier.keys import TierKeys
from deployments.kv_tier.ray_store import RayStore
from deployments.kv_tier.settings import TierSettings
from deployments.kv_transfer import direct

GIVING = "tier-give"
REST = "other processes"
# As their processes' names begin.
OTHERS = ("ray::IndexActor", "raylet", "gcs_server")
TIER_THREADS = (GIVING, "tier-offer", "tier-fetch", "tier-copy")


class SwitchedHost(EngineHost):
    """A host that can leave its tier."""

    def leave_tier(self) -> None:
        """Give and take nothing more; nothing runs."""
        if self._tier is not None:
            self._tier.stop()
            self._tier = None


class SwitchedActor(EngineActor):
    """See the module; it begins without the tier.

    Args:
        config: of the engine.
        tier: to turn on.
    """

    def __init__(self, config: Any, tier: TierSettings) -> None:
        super().__init__(config, self._build)
        self._settings = tier
        self._store = RayStore(tier)
        self._giving: set[int] = set()

    def _build(self, config: Any) -> BuiltEngine:
        self._built = build_engine(config)
        return self._built

    def build_host(self, built: BuiltEngine) -> EngineHost:
        return SwitchedHost(built, self._events.put)

    @ray.method(concurrency_group="ctl")
    def switch(self, is_on: bool) -> None:
        """Turn the tier on or off; nothing runs."""
        host, built = self._host, self._built
        assert isinstance(host, SwitchedHost) and built.layout is not None
        host.leave_tier()
        if is_on:
            keys = TierKeys(built.layout, self._settings.object_bytes)
            host.use_tier(self._store, keys, self._settings.copy_share_on(built.device_type))

    @ray.method(concurrency_group=direct.TIER_GROUP)
    def give(self, key: bytes) -> Any:
        self._giving.add(threading.get_native_id())
        return self._host.give(key) or (None, None)

    @ray.method(concurrency_group="ctl")
    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of this process's threads since they began, by kind: those of the tier, and the rest."""
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        names |= dict.fromkeys(self._giving, GIVING)
        found = dict.fromkeys((*TIER_THREADS, "rest"), 0.0)
        for thread in psutil.Process().threads():
            name = names.get(thread.id, "")
            kind = next((kind for kind in TIER_THREADS if name.startswith(kind)), "rest")
            found[kind] += thread.user_time + thread.system_time
        return found


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds since all began; differences of two count.

    Attributes:
        engine: by kind of thread.
        others: of Ray's other processes: the index, the raylet with its object store, the rest.
    """

    engine: dict[str, float]
    others: dict[str, float]

    def since(self, before: "Spent") -> "Spent":
        return Spent(_less(self.engine, before.engine), _less(self.others, before.others))

    @property
    def total(self) -> float:
        return sum(self.engine.values()) + sum(self.others.values())


def spent(actor: Any, pid: int) -> Spent:
    """What the engine and the rest of this program's Ray have used.

    Args:
        actor: a `SwitchedActor`.
        pid: of its process.
    """
    others = dict.fromkeys((*OTHERS, REST), 0.0)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            name, times = process.name(), process.cpu_times()
            if process.pid != pid:
                others[next((kind for kind in OTHERS if kind in name), REST)] += times.user + times.system
    return Spent(ray.get(actor.cpu_s.remote()), others)


def _less(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {kind: max(0.0, seconds - before[kind]) for kind, seconds in now.items()}
