"""Attention sinks put into what attention without them gave, on a GPU, in Triton."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor


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


@triton.jit
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
