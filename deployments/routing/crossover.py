"""Whether a prompt is computed by the decode engine that will continue it, or by the prefill pool. Pure.

What either way puts at risk is compared, in requests that may miss their bounds. The request's own first token: the
closer to its bound, the more, and beyond it more still, so that the lesser of two delays is chosen. The gaps of the
sequences that run: a prompt in their midst delays each of them once; and if it makes a step longer than the bound of
gaps, it takes one of the few late gaps that each of them may have. A hand-off puts nobody at risk but the request,
which waits for it behind its first token.

So an idle decode engine computes prompts itself, and a busy one leaves them to the prefill pool, unless that is busier
still or far away, or next to nothing is left to compute.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import msgspec

# Holds while nothing is known: where routers are off, or no replica was heard of.
_UNMEASURED_MIN_TOKENS = 256
# Calls from process to process, before a prefill engine hears of a prompt: by so much its first token comes later than
# if the engine had been asked itself (512 tokens of Llama-3.1-8B's shape on one H100, docs/measured.md).
_MESSAGES_S = 0.005


@dataclass(frozen=True, slots=True)
class Goals:
    """What requests are to keep.

    Attributes:
        ttft_s: bound of the time to first token.
        itl_s: bound of the gaps between tokens.
        late_share: of a request's gaps, that may be longer.
    """

    ttft_s: float
    itl_s: float
    late_share: float = 0.05


@dataclass(frozen=True, slots=True)
class Gaps:
    """The gaps between tokens in a decode pool.

    Attributes:
        num_new_tokens: that a sequence generates, in the mean.
        step_s: of a step without sequences or prompts.
        sequence_s: by how much each sequence makes it longer.
        late_share: of all gaps lately, that were longer than their bound.
    """

    num_new_tokens: float
    step_s: float = 0.0
    sequence_s: float = 0.0
    late_share: float = 0.0

    def one_more(self, goals: Goals) -> float:
        """How likely a late gap more is the one too many for a sequence.

        Late gaps come by chance (Poisson). Where there are too many already, one more is taken to matter as much as at
        the edge: else nothing would lead back.
        """
        num_allowed = int(goals.late_share * self.num_new_tokens)
        return _poisson(num_allowed, min(self.late_share * self.num_new_tokens, float(num_allowed)))


class Here(msgspec.Struct, frozen=True, gc=False):
    """A decode engine, as far as it matters.

    Attributes:
        token_s: a prompt token is computed in its steps.
        queued_tokens: that it has to compute before.
        num_sequences: that draw tokens.
        step_tokens: of a full step.
    """

    token_s: float
    queued_tokens: float
    num_sequences: float
    step_tokens: int


class There(msgspec.Struct, frozen=True, gc=False):
    """The prefill pool, for one prompt.

    Attributes:
        computing_s: until the prompt is computed there.
        handoff_s: until the last piece of it has arrived here, whatever its size.
        token_s: and for each of its tokens.
        sure: part of these two that is sure: what is not tried is not measured, so in doubt it is tried.
    """

    computing_s: float
    handoff_s: float = 0.0
    token_s: float = 0.0
    sure: float = 1.0

    def taking(self, computing_s: float) -> "There":
        """With a prompt that is computed after so long."""
        return There(computing_s, self.handoff_s, self.token_s, self.sure)

    def gap_s(self, num_tokens: int) -> float:
        """Behind the first token, if decode lacks so many."""
        return self.handoff_s + num_tokens * self.token_s

    def seconds(self, num_tokens: int) -> float:
        """Until decode can go on."""
        return self.computing_s + self.gap_s(num_tokens)


@dataclass(frozen=True, slots=True)
class Crossover:
    """How it is decided.

    Attributes:
        goals: what requests are to keep.
        min_tokens: with so many tokens or more that decode lacks, a prompt goes to the prefill pool; None: decided by
            what was measured.
        may_lack_pool: there may be no prefill replica.
    """

    goals: Goals
    min_tokens: int | None = None
    may_lack_pool: bool = False

    @property
    def default_tokens(self) -> int:
        """What holds while nothing is measured."""
        return default_tokens(self.min_tokens)

    def is_remote(self, num_tokens: int, here: Here, there: There, gaps: Gaps) -> bool:
        """Whether a prompt goes to the prefill pool of which the decode engine lacks so many tokens."""
        if self.min_tokens is not None:
            return num_tokens >= self.min_tokens
        return risk_there(num_tokens, there, gaps, self.goals) < risk_here(num_tokens, here, gaps, self.goals)

    def threshold(self, max_tokens: int, here: Here, there: There, gaps: Gaps) -> int:
        """The fewest tokens of a prompt of `max_tokens` with which it goes there; `max_tokens + 1`: it never does.

        For the engine, which alone knows what it has cached when the prompt's turn comes. Where more tokens speak
        against the prefill pool, those of the whole prompt decide.
        """
        if self.min_tokens is not None:
            return self.min_tokens
        low, high = 0, max_tokens + 1
        if not self.is_remote(max_tokens, here, there, gaps):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self.is_remote(middle, here, there, gaps):
                high = middle
            else:
                low = middle
        return high


def default_tokens(min_tokens: int | None) -> int:
    """What holds for a setting of `Crossover.min_tokens` while nothing is measured."""
    return _UNMEASURED_MIN_TOKENS if min_tokens is None else min_tokens


@lru_cache(maxsize=64)  # asked for with every request, and another one with every reading
def _poisson(count: int, mean: float) -> float:
    """How likely so many are where there are so many in the mean."""
    if mean <= 0:
        return 0.0 if count else 1.0
    return math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))


def risk_here(num_tokens: int, here: Here, gaps: Gaps, goals: Goals) -> float:
    """Requests that miss their bounds if the decode engine computes so many tokens."""
    token_s, itl_s, num_sequences = here.token_s, goals.itl_s, here.num_sequences
    own_s = num_tokens * token_s
    share = (here.queued_tokens * token_s + own_s) / goals.ttft_s
    first = share if share <= 1.0 else share * share
    if num_sequences <= 0:
        return first
    num_new_tokens = gaps.num_new_tokens
    delayed = own_s / ((num_new_tokens if num_new_tokens > 1.0 else 1.0) * itl_s)
    in_step, step_tokens = here.queued_tokens + num_tokens, here.step_tokens
    if in_step > step_tokens:
        in_step = step_tokens
    if gaps.step_s + gaps.sequence_s * num_sequences + in_step * token_s > itl_s:
        delayed += math.ceil(num_tokens / step_tokens) * gaps.one_more(goals)
    return first + num_sequences * delayed


def risk_there(num_tokens: int, there: There, gaps: Gaps, goals: Goals) -> float:
    """Requests that miss their bounds if the prefill pool computes them."""
    gap_s = there.sure * (there.handoff_s + num_tokens * there.token_s)  # behind the first token, which prefill sends
    share, num_new_tokens = (there.computing_s + _MESSAGES_S) / goals.ttft_s, gaps.num_new_tokens
    own = share if share <= 1.0 else share * share
    own += gap_s / ((num_new_tokens if num_new_tokens > 1.0 else 1.0) * goals.itl_s)
    return own + (gaps.one_more(goals) if gap_s > goals.itl_s else 0.0)
