"""What kernels of attention on a GPU share, in Triton: scores in powers of two, their running softmax, and slots."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import triton
import triton.language as tl

from deployments.engine.kernels.arguments import Scores

_LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """How a program walks along the keys."""

    num_tokens: int
    num_warps: int
    num_stages: int


def factors(scores: Scores) -> tuple[float, float, int]:
    """Arguments `scaling` and `softcap`, in powers of two, and `window` of a kernel."""
    return scores.scaling * _LOG2_E, (scores.softcap or 0.0) * _LOG2_E, scores.window or 0


def switches(scores: Scores) -> dict[str, bool]:
    """Constants of a kernel: what there is of what a layer may do with its scores."""
    return {
        "HAS_WINDOW": scores.window is not None,
        "HAS_SOFTCAP": scores.softcap is not None,
        "HAS_SINKS": scores.sinks is not None,
    }


@triton.jit
def slots_of_tile(table, first, tokens, BLOCK_SIZE: tl.constexpr):
    """Where in the pool the tokens `first + tokens` of a sequence are, all of one block."""
    block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
    return block * BLOCK_SIZE + first % BLOCK_SIZE + tokens


@triton.jit
def codes_of_tile(table, first, tokens, token_stride, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """As `slots_of_tile`, of a pool in FP8: where a head's codes of these tokens are, and where their scales.

    Both count from where those of the first block are, of the same head; `token_stride` is between tokens' codes.
    """
    block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
    inner = first % BLOCK_SIZE + tokens
    block_bytes = BLOCK_SIZE * (token_stride // HEAD_DIM * (HEAD_DIM + 4))
    return block * block_bytes + inner * token_stride, block * (block_bytes // 4) + inner


@triton.jit
def squash(scores, softcap):
    """Softcap times the hyperbolic tangent of scores / softcap; both in powers of two."""
    # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends; 2.885... = 2 / ln 2.
    power = tl.exp2(scores / softcap * 2.8853900817779268)
    return softcap * (1 - 2 / (power + 1))


@triton.jit
def empty_softmax(ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Peak, total and result of rows that have seen no key."""
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    return peak, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, DIMS), tl.float32)


@triton.jit
def weigh(scores, peak, total, MAY_SEE_NOTHING: tl.constexpr):
    """Take a tile's scores into the softmax of its rows.

    Returns:
        The new peak and total, the weights of the tile's values, and the factor on what was summed up before.
    """
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    # A row that has seen nothing yet has no peak, and -inf less itself is no number.
    base = tl.where(higher == float("-inf"), 0.0, higher) if MAY_SEE_NOTHING else higher
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    return higher, total * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit
def _add_sink(sink, peak, total, result):
    """Take a score of each row that has no value into the softmax: the new total and result."""
    sink = sink.to(tl.float32) * 1.4426950408889634
    higher = tl.maximum(peak, sink)
    shrink = tl.exp2(peak - higher)
    return total * shrink + tl.exp2(sink - higher), result * shrink[:, None]


@triton.jit
def store_mean(place, kept, sinks, head, peak, total, result, HAS_SINKS: tl.constexpr):
    """Store the weighted mean of rows, each of a head that may have a sink; zeros of rows that have seen nothing."""
    if HAS_SINKS:
        total, result = _add_sink(tl.load(sinks + head), peak, total, result)
    mean = result / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(place, mean.to(place.dtype.element_ty), mask=kept)


@triton.jit
def unseen_out(scores, position, key, window, HAS_WINDOW: tl.constexpr):
    """Scores of the keys that a row at its position sees, -inf for others: those behind it, or before its window."""
    seen = position[:, None] >= key[None, :]
    if HAS_WINDOW:
        seen &= position[:, None] - window < key[None, :]
    return tl.where(seen, scores, float("-inf"))
