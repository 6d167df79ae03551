"""Attention put together from parts by their log-sum-exp, on a GPU, in Triton: of other keys, or of sinks."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor


def merge_rows(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, rows: Tensor) -> None:
    """Put attention of other keys into some rows, in place.

    Args:
        out: (T, H, head_dim), contiguous.
        lse: (H, T) float32, contiguous: log-sum-exp of its scores; becomes that of both.
        other: (M, H, head_dim), contiguous.
        other_lse: (H, M) float32, contiguous.
        rows: (M,) int64 rows of `out`, each once.
    """
    num_rows, num_heads, head_dim = other.shape
    tokens = 16
    _merge_rows[(triton.cdiv(num_rows, tokens), num_heads)](
        out,
        lse,
        other,
        other_lse,
        rows,
        len(out),
        num_rows,
        num_heads,
        TOKENS=tokens,
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


def scale_rows(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Scale each head's output, in place, by what its sink leaves it of the softmax.

    Args:
        out: (T, H, head_dim), contiguous.
        lse: (H, T) float32, contiguous: log-sum-exp of the scores without the sink.
        sinks: (H,) scores.
    """
    num_tokens, num_heads, head_dim = out.shape
    tokens = 16
    _scale_rows[(triton.cdiv(num_tokens, tokens), num_heads)](
        out,
        lse,
        sinks,
        num_tokens,
        num_heads,
        TOKENS=tokens,
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_tokens"])  # or steps of other sizes would compile their own
def _scale_rows(
    out, lse, sinks, num_tokens, num_heads, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr
):
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    dims = tl.arange(0, DIMS)
    inside = token < num_tokens
    normaliser = tl.load(lse + head.to(tl.int64) * num_tokens + token, mask=inside, other=0.0)
    share = tl.sigmoid(normaliser - tl.load(sinks + head).to(tl.float32))
    at = (token.to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    kept = inside[:, None] & (dims < HEAD_DIM)[None, :]
    value = tl.load(out + at, mask=kept, other=0.0).to(tl.float32) * share[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])  # or steps of other sizes would compile their own
def _merge_rows(
    out,
    lse,
    other,
    other_lse,
    rows,
    num_tokens,
    num_rows,
    num_heads,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    row, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, DIMS)
    inside = row < num_rows
    token = tl.load(rows + row, mask=inside, other=0)
    first = tl.load(lse + head * num_tokens + token, mask=inside, other=0.0)
    second = tl.load(other_lse + head * num_rows + row, mask=inside, other=0.0)
    # Each has a finite normaliser: a query sees itself, and of the tile before at least one key, or none (-inf).
    peak = tl.maximum(first, second)
    total = tl.exp(first - peak) + tl.exp(second - peak)
    of_first, of_second = tl.exp(first - peak) / total, tl.exp(second - peak) / total
    kept = inside[:, None] & (dims < HEAD_DIM)[None, :]
    at = (token * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    at_other = (row.to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    value = tl.load(out + at, mask=kept, other=0.0).to(tl.float32) * of_first[:, None]
    # What was attended by nothing may hold anything.
    seen = kept & (of_second > 0)[:, None]
    value += tl.load(other + at_other, mask=seen, other=0.0).to(tl.float32) * of_second[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=kept)
    tl.store(lse + head * num_tokens + token, peak + tl.log(total), mask=inside)
