"""What a request costs at a replica, in seconds, and which replica it goes to. Pure functions of numbers.

A prompt at a prefill replica costs what it waits for, what is left of it to compute, and something for how much that
replica was given lately. The last is what spreads: a prefix is computed again elsewhere as soon as its replica has been
given more than the others by what the prefix is worth. A hot one is worth little (`heat.py`), and soon is everywhere.

A request at a decode replica costs the fill of what is not there already, the wait for a seat, what it and the others
of the batch slow each other down, and the risk of having too few blocks later.

Of replicas that cost nearly the same the choice falls by a hash of the prompt and of the replica's name: routers that
know nearly the same choose the same without talking, and different prompts go to different replicas. Where a caller
gives a `prompt_cache_key`, it takes the place of the prompt, and decides among replicas that differ by more; but not
against what is known to be cached.

Source: rendezvous hashing (Thaler and Ravishankar, 1998).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from deployments.routing.crossover import Crossover, Gaps, Here, There, risk_here, risk_there
from deployments.routing.settings import DecodeWeights, PrefillWeights


@dataclass(frozen=True, slots=True)
class Costs:
    """What work takes in the engines of one pool; they are taken to be alike.

    Attributes:
        token_s: a prompt token is computed.
        sequence_s: by how much each sequence of the batch makes a step longer.
        seat_s: a seat is held, in the mean.
        tier_token_s: a token comes from the shared tier; None: there is none, or none has come yet.
    """

    token_s: float
    sequence_s: float = 0.0
    seat_s: float = 0.0
    tier_token_s: float | None = None


# Structs, not dataclasses: one of each is made for every decision or replica (0.2 us against 1.2 us).
class Elsewhere(msgspec.Struct, frozen=True):
    """What it takes to have a prompt computed by another pool, and its KV brought here.

    Attributes:
        crossover: whether it is.
        there: what it takes.
        gaps: between tokens in this pool.
        risks: of the other pool, by how many tokens are brought; for most replicas of a decision they are as many.
    """

    crossover: Crossover
    there: There
    gaps: Gaps
    risks: dict[int, float] = msgspec.field(default_factory=dict)

    def is_remote(self, num_tokens: int, here: Here) -> bool:
        """See `Crossover.is_remote`."""
        crossover = self.crossover
        if crossover.min_tokens is not None:
            return num_tokens >= crossover.min_tokens
        risk = self.risks.get(num_tokens)
        if risk is None:
            risk = self.risks[num_tokens] = risk_there(num_tokens, self.there, self.gaps, crossover.goals)
        return risk < risk_here(num_tokens, here, self.gaps, crossover.goals)


class Sizes(msgspec.Struct, frozen=True):
    """What a request asks of a replica.

    Attributes:
        num_tokens: of its prompt.
        num_new_tokens: that it is expected to generate.
        elsewhere: see `score_decode`.
        shared_tokens: leading ones of the prompt that some engine has, so that the tier likely has them.
    """

    num_tokens: int
    num_new_tokens: int = 0
    elsewhere: Elsewhere | None = None
    shared_tokens: int = 0


class Reason(StrEnum):
    """What decided a choice."""

    ONLY = "only"
    CACHE = "cache"  # it has more of the prompt than another, and none has more
    LOAD = "load"  # none has more of it, and it is the least busy
    SPREAD = "spread"  # another one has more of it, and is too busy, or it is too hot a prefix
    TIE = "tie"  # several cost as much, and a hash has chosen
    KEY = "key"  # several cost nearly as much, and the request's `prompt_cache_key` has chosen


class HeldKV(NamedTuple):
    """How much of a sequence's KV an engine holds at once, in groups of layers with blocks of their own.

    Attributes:
        num_full: groups that hold all.
        num_windowed: groups that hold a part.
        max_tokens: of the sequence, in such a part.
    """

    num_full: int = 1
    num_windowed: int = 0
    max_tokens: int = 0

    def blocks(self, num_tokens: int, block_size: int) -> int:
        """That so many tokens take at once."""
        part = num_tokens if num_tokens < self.max_tokens else self.max_tokens
        return self.num_full * -(-num_tokens // block_size) + self.num_windowed * -(-part // block_size)


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A replica as a router sees it.

    Attributes:
        replica: its name.
        cached_tokens: leading prompt tokens that it has or will have.
        kept_tokens: what these are worth, at most as many; see `heat.py`.
        queued_tokens: prompt tokens that it has to compute before, by itself.
        recent_tokens: of prompts that it was given lately, without what was cached.
        num_sequences: that have a seat or wait for one.
        max_sequences: seats.
        num_free_blocks: without what is promised to sequences on their way.
        num_blocks: of its pool.
        block_size: tokens per block.
        step_tokens: of a full step.
        held: what it holds of a sequence's KV at once.
    """

    replica: str
    cached_tokens: int = 0
    kept_tokens: float = 0.0
    queued_tokens: float = 0.0
    recent_tokens: float = 0.0
    num_sequences: float = 0.0
    max_sequences: int = 1
    num_free_blocks: float = 0.0
    num_blocks: int = 1
    block_size: int = 1
    step_tokens: int = 1
    held: HeldKV = HeldKV()


class Score(msgspec.Struct, frozen=True, gc=False):
    """What a request costs at a replica; the parts are seconds, not weighed.

    Attributes:
        replica: its name.
        cost: the weighed sum; the least is the best.
        cached_tokens: that need not be computed or brought.
        own_s: what is left of the prompt takes.
        wait_s: before its turn.
        other_s: what is neither, weighed: how crowded or full it is there.
        here: at a decode replica, what matters of it when another pool may compute the prompt.
    """

    replica: str
    cost: float
    cached_tokens: int
    own_s: float
    wait_s: float
    other_s: float
    here: Here | None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """A replica, and why it.

    Attributes:
        score: of the chosen one.
        others: scores of the others.
        num_equals: of them, those that were taken to cost the same.
        by_key: among these a `prompt_cache_key` has decided, not the prompt.
    """

    score: Score
    others: tuple[Score, ...]
    num_equals: int
    by_key: bool = False

    @property
    def replica(self) -> str:
        """Its name."""
        return self.score.replica

    @property
    def reason(self) -> Reason:
        """What decided."""
        if not self.others:
            return Reason.ONLY
        cached = [score.cached_tokens for score in self.others]
        if max(cached) > self.score.cached_tokens:
            return Reason.SPREAD
        if self.num_equals:
            return Reason.KEY if self.by_key else Reason.TIE
        return Reason.CACHE if min(cached) < self.score.cached_tokens else Reason.LOAD

    def describe(self) -> str:
        """In words, for a receipt."""
        words = f"{self.score.replica}: {_describe(self.score)}"
        if not self.others:
            return f"{words}; the only replica"
        if self.num_equals:
            count = f"{self.num_equals} more of {len(self.others) + 1}"
            words += f"; {count} cost {'nearly as much, and its key chose' if self.by_key else 'as much'}"
        longest = max(self.others, key=lambda score: score.cached_tokens)
        if longest.cached_tokens > self.score.cached_tokens:
            return f"{words}; not {longest.replica}, which has more: {_describe(longest)}"
        nearest = min(self.others, key=lambda score: score.cost)
        return f"{words}; next {nearest.replica}: {_describe(nearest)}"


def score_prefill(
    num_tokens: int, candidate: Candidate, costs: Costs, weights: PrefillWeights, shared_tokens: int = 0
) -> Score:
    """What a prompt of so many tokens costs at a prefill replica; `shared_tokens`: see `Sizes`."""
    num_brought, bringing_s = _bring(candidate, shared_tokens, costs)
    own_s = (num_tokens - candidate.cached_tokens - num_brought) * costs.token_s + bringing_s
    wait_s = candidate.queued_tokens * costs.token_s
    crowd_s = weights.crowding * candidate.recent_tokens * costs.token_s
    lost_s = (num_tokens - candidate.kept_tokens - num_brought) * costs.token_s + bringing_s
    cost = weights.compute * lost_s + weights.queue * wait_s + crowd_s
    return Score(candidate.replica, cost, candidate.cached_tokens, own_s, wait_s, crowd_s)


def score_decode(
    num_tokens: int,
    num_new_tokens: int,
    candidate: Candidate,
    costs: Costs,
    weights: DecodeWeights,
    elsewhere: Elsewhere | None = None,
    shared_tokens: int = 0,
) -> Score:
    """What a request costs at a decode replica.

    Args:
        num_tokens: of its prompt.
        num_new_tokens: that it is expected to generate.
        candidate: the replica.
        costs: of its pool.
        weights: of the parts.
        elsewhere: where the prompt is computed if much of it is not here; None: always here.
        shared_tokens: see `Sizes`.
    """
    num_brought, own_s = _bring(candidate, shared_tokens, costs)
    cached_tokens, num_sequences, max_sequences = (
        candidate.cached_tokens,
        candidate.num_sequences,
        candidate.max_sequences,
    )
    num_free, num_blocks = candidate.num_free_blocks, candidate.num_blocks
    num_left = num_tokens - cached_tokens - num_brought
    batch = num_sequences if num_sequences < max_sequences else max_sequences
    here = Here(costs.token_s, candidate.queued_tokens, batch, candidate.step_tokens)
    if elsewhere is not None and elsewhere.is_remote(num_left, here):
        own_s += elsewhere.there.seconds(num_left)
    else:
        own_s += (candidate.queued_tokens + num_left) * costs.token_s
    num_uncached = num_tokens + num_new_tokens - cached_tokens
    num_needed = candidate.held.blocks(num_uncached, candidate.block_size)
    wait_s = 0.0
    if num_sequences + 1 > max_sequences or num_needed > num_free:
        num_beyond = max(0.0, num_sequences + 1 - max_sequences)
        missing = max(0.0, num_needed - num_free) / num_blocks  # of all seats as well
        wait_s = (num_beyond / max_sequences + missing) * costs.seat_s
    other_s = weights.batch * (batch * costs.sequence_s * num_new_tokens)
    used = 1.0 - (num_free - num_needed) / num_blocks
    if used > weights.full_from:
        other_s += weights.full * ((used - weights.full_from) / (1.0 - weights.full_from))
    cost = weights.fill * own_s + weights.seat * wait_s + other_s
    return Score(candidate.replica, cost, cached_tokens, own_s, wait_s, other_s, here)


def _bring(candidate: Candidate, shared_tokens: int, costs: Costs) -> tuple[int, float]:
    """Tokens that a replica would fetch from the shared tier rather than compute, and how long that takes."""
    if costs.tier_token_s is None or costs.tier_token_s >= costs.token_s:
        return 0, 0.0
    num_brought = max(0, shared_tokens - candidate.cached_tokens)
    return num_brought, num_brought * costs.tier_token_s


def choose(
    scores: Sequence[Score], tie_s: float, key: bytes, meeting_key: bytes | None = None, meeting_tie_s: float = 0.0
) -> Choice:
    """The replica that costs least.

    Args:
        scores: of all replicas, at least one.
        tie_s: those that cost at most so much above the cheapest are taken to cost the same.
        key: of the prompt; of equals, those that have most of it, it decides.
        meeting_key: of requests that are to meet; None: this one need not. It takes the place of `key` where all
            replicas have equally much of the prompt.
        meeting_tie_s: likewise, of `tie_s`, if it is more.
    """
    by_key = meeting_key is not None and len({score.cached_tokens for score in scores}) == 1
    if meeting_key is not None and by_key:
        key, tie_s = meeting_key, max(tie_s, meeting_tie_s)
    least = min(score.cost for score in scores)
    equals = [score for score in scores if score.cost <= least + tie_s]
    most = max(score.cached_tokens for score in equals)
    equals = [score for score in equals if score.cached_tokens == most]
    best = equals[0] if len(equals) == 1 else max(equals, key=lambda score: _draw(key, score.replica))
    return Choice(best, tuple(score for score in scores if score is not best), len(equals) - 1, by_key)


def _draw(key: bytes, replica: str) -> bytes:
    return blake2b(replica.encode(), key=key[:64], digest_size=8).digest()


def _describe(score: Score) -> str:
    return (
        f"{score.cached_tokens} tokens cached, {score.own_s:.3f} s for the rest, {score.wait_s:.3f} s of waiting, "
        f"{score.other_s:.3f} s for how busy it is"
    )
