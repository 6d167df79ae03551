"""What a user can set about routing. `app/config.py` has it as `routing.*`."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from deployments.routing.index import EXPECTED_FOR_S, MAX_BLOCKS_PER_REPLICA

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
# Times a cost in seconds it stays a number that can be compared.
Weight = Annotated[float, Field(ge=0, le=1e6)]


class PrefillWeights(BaseModel):
    """How the costs of a prompt at a prefill replica are weighed; seconds times these are compared.

    On the trace of `make bench-router`, `compute` at 8 rather than 4 keeps 92 instead of 88% of the reuse and lowers
    the mean TTFT by 3% on engines busy 80% of the time, and raises it by 4% at 40%; with 16 a hot prefix is spread too
    late (2026-11-28).

    Attributes:
        compute: weight of what is left to compute, by what cached blocks are worth; far above 1, for what is computed
            again also delays all that come later.
        queue: weight of what waits there.
        crowding: weight of what the replica was given lately; 0: a prefix stays where it is until a queue grows.
        hot_asks: a cached block counts by as much less as it is asked for more often than that, for each replica that
            has it.
        tie: replicas that cost no more than this share of the whole prompt's time above the cheapest are taken to cost
            the same.
    """

    model_config = _FROZEN

    compute: Weight = 8.0
    queue: Weight = 1.0
    crowding: Weight = 0.3
    hot_asks: float = Field(default=2.0, gt=0)
    tie: float = Field(default=0.02, ge=0, le=1)


class DecodeWeights(BaseModel):
    """How the costs of a request at a decode replica are weighed.

    Attributes:
        fill: weight of the time to bring or compute what of the prompt is not there.
        seat: weight of the wait for a seat.
        batch: weight of the time by which the batch's size makes the request longer.
        full: seconds that a pool without a free block costs; it begins to at `full_from`.
        full_from: share of used blocks up to which they cost nothing.
        tie: see `routing.prefill.tie`.
    """

    model_config = _FROZEN

    fill: Weight = 1.0
    seat: Weight = 1.0
    batch: Weight = 1.0
    full: Weight = 1.0
    full_from: float = Field(default=0.8, ge=0, lt=1)
    tie: float = Field(default=0.02, ge=0, le=1)


class RoutingSettings(BaseModel):
    """How replicas are chosen.

    Attributes:
        by_prefix: choose replicas by what they have cached, what waits there and what that costs; false leaves the
            choice to Ray Serve.
        prefill: weights of the choice of a prefill replica.
        decode: weights of the choice of a decode replica.
        key_tie: of replicas that have equally much of a prompt with a `prompt_cache_key`, those that cost at most this
            share of the whole prompt's time more than the cheapest are taken to cost the same, and the key decides. All
            that can be saved where others of the key went is to compute the prompt.
        max_blocks_per_replica: cached KV blocks that each ingress replica knows of one engine at most.
        expected_for_s: seconds for which the blocks of a prompt that was sent are expected at its replica.
    """

    model_config = _FROZEN

    by_prefix: bool = True
    prefill: PrefillWeights = Field(default_factory=PrefillWeights)
    decode: DecodeWeights = Field(default_factory=DecodeWeights)
    key_tie: Weight = 1.0
    max_blocks_per_replica: int = Field(default=MAX_BLOCKS_PER_REPLICA, ge=1)
    expected_for_s: float = Field(default=EXPECTED_FOR_S, gt=0)
