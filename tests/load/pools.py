"""Readings of pools for an admission, second by second."""

import copy
from dataclasses import dataclass, field, replace

import pytest

from deployments.engine.stats import EngineStats
from deployments.errors import OverloadedError
from deployments.load.admission import Admission, Bounds, Ticket
from deployments.load.outlook import Outlook
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.load.step_cost import StepCost
from deployments.messages import Priority

BOUNDS = Bounds(max_ttft_s=10.0, max_queued_tokens=1_000_000, min_remote_tokens=100)
IDLE = EngineStats(num_blocks=1000, max_num_seqs=8, max_num_batched_tokens=1, num_receivers=1)
A, B = b"a", b"b"


def measured(tokens_per_s: float) -> StepCost:
    """A cost that is known to about one percent."""
    cost = StepCost()
    for _ in range(2000):
        cost.add(1, 1, 1 / tokens_per_s)
    return cost


SURE = measured(100.0)


def worked(engine: EngineStats, seconds: float, tokens_per_s: float = 100.0) -> EngineStats:
    """The same engine, later."""
    num_tokens = round(seconds * tokens_per_s)
    return replace(
        engine,
        prompt_tokens=engine.prompt_tokens + num_tokens,
        prefill_steps=engine.prefill_steps + num_tokens,
        prefill_s=engine.prefill_s + seconds,
    )


@dataclass
class Pools:
    """Readings, given to an admission second by second; prefill engines compute 100 tokens per second."""

    bounds: Bounds
    now_s: float = 1000.0
    cost: StepCost = field(default_factory=lambda: copy.copy(SURE))
    prefill: dict[str, EngineStats] = field(default_factory=lambda: {"p": IDLE})
    decode: dict[str, EngineStats] = field(default_factory=lambda: {"d": IDLE})

    def __post_init__(self) -> None:
        self.admission = Admission(self.bounds, lambda: self.now_s)
        self.admission.pools[PREFILL].cost = self.cost

    def read(self) -> None:
        self.now_s += 1.0
        self.admission.update(Reading({PREFILL: self.prefill, DECODE: self.decode}, self.now_s))

    def admit(self, *sizes: int, priority: Priority = Priority.NORMAL, key: bytes = A) -> Ticket:
        return self.admission.admit(sizes, priority, key)

    def outlook(self, pool: str = PREFILL) -> Outlook:
        return self.admission.outlook(pool)

    def refusal(self, *sizes: int, priority: Priority = Priority.NORMAL, key: bytes = A) -> OverloadedError:
        with pytest.raises(OverloadedError) as caught:
            self.admit(*sizes, priority=priority, key=key)
        return caught.value

    def queue(self, num_tokens: int) -> None:
        """The prefill engine has so many prompt tokens before it."""
        self.prefill["p"] = replace(self.prefill["p"], num_queued_prompt_tokens=num_tokens)
        self.read()


def build(**changes: float | None) -> Pools:
    pools = Pools(replace(BOUNDS, **changes))  # type: ignore[arg-type]
    pools.read()
    return pools
