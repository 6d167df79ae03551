"""What one replica tells of itself when it is asked: plain numbers, which `load` judges and `metrics` shows."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats, Histogram
from deployments.receipts import HandoffReceipt

# How far somebody has read of each replica's prefix cache, by the name of the replica; None: nothing yet.
Positions = Mapping[str, Position | None]


@dataclass(slots=True)
class HandoffStats:
    """What a front has handed over (prefill) or failed to get (decode).

    Attributes:
        num_requests: requests whose KV arrived whole.
        num_failures: requests whose hand-off ended in an error.
        num_chunks: chunks that arrived.
        num_blocks: KV blocks that arrived.
        num_bytes: bytes that arrived.
        hidden_s: seconds in which chunks of a prompt were on their way while it was still computed.
        exposed_s: seconds from the end of that until all of it had arrived.
        seconds: per chunk, from computed to arrived in the other engine's pool.
    """

    num_requests: int = 0
    num_failures: int = 0
    num_chunks: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    hidden_s: float = 0.0
    exposed_s: float = 0.0
    seconds: Histogram = field(default_factory=Histogram)

    def observe(self, num_blocks: int, num_bytes: int, seconds: float) -> None:
        """A chunk has arrived."""
        self.num_chunks += 1
        self.num_blocks += num_blocks
        self.num_bytes += num_bytes
        self.seconds.observe(seconds)

    def note_whole(self, handoff: HandoffReceipt) -> None:
        """All of a prompt has arrived."""
        self.num_requests += 1
        self.hidden_s += handoff.hidden_s
        self.exposed_s += handoff.exposed_s

    def copy(self) -> "HandoffStats":
        return replace(self, seconds=self.seconds.copy())


class Computed(StrEnum):
    """Where a prompt was computed."""

    CACHED = "cached"  # at the decode engine, which had all of it but the last block, and not nothing
    DECODE = "decode"
    PREFILL = "prefill"


def no_prompts() -> Counter[str]:
    """Each way from the start: what was not seen before has no rate."""
    return Counter({where.value: 0 for where in Computed})


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """Everything one prefill or decode replica tells of itself.

    Attributes:
        replica: its name.
        engine: of its engine.
        handoff: of its front.
        age_s: since the engine said so; above 0 if it did not answer soon enough this time.
        cache: what changed in its prefix cache; None: nobody asked, or the engine did not answer.
        prompts: that a decode replica had, by where they were computed in the end; one that was lost and resumed counts
            again.
    """

    replica: str
    engine: EngineStats
    handoff: HandoffStats
    age_s: float = 0.0
    cache: CacheEvents | None = None
    prompts: Counter[str] = field(default_factory=Counter)
