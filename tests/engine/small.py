"""Engines of one layer, whose steps take about a millisecond, and what they say."""

import time
from collections.abc import Iterator
from functools import cache

from deployments.engine.engine import Engine
from deployments.engine.handoff.states import Clock
from deployments.engine.model.load import LoadedModel, prepare_model
from deployments.messages import EngineEvent
from tests.engine.driving import build_engine
from tests.engine.families import CPU, small_model
from tests.tiny_models import ONE_LAYER

LEASE_S = 15.0  # as by default
BLOCK_SIZE = 4
POOL_BLOCKS = 14  # one request of the random ones may need 10: two long ones must fight for blocks


@cache
def tiny() -> LoadedModel:
    """One layer, so that a step takes about a millisecond."""
    return prepare_model(small_model("LlamaConfig", **ONE_LAYER), "", CPU)


def build_small(
    loaded: LoadedModel | None = None,
    *,
    is_pipelined: bool = False,
    clock: Clock = time.monotonic,
    **overrides: object,
) -> Engine:
    shape: dict[str, object] = {"block_size": BLOCK_SIZE, "num_blocks": POOL_BLOCKS, "lease_s": LEASE_S}
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 8}
    return build_engine(loaded or tiny(), is_pipelined=is_pipelined, clock=clock, **(shape | limits | overrides))


def iter_events(engine: Engine) -> Iterator[EngineEvent]:
    while engine.has_work:
        yield from engine.step()


# Few prompts that begin alike, so that prefixes meet; drawn tokens depend on the seed and so on every logit.
