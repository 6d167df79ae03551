"""Scores of experts from a router's weights on a GPU, in Triton. `cuda_routing.py` chooses by them."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_matmul import add_products
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier

# Products of more rows are torch's.
_MAX_ROWS = 256


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scores of experts before any activation, summed and kept in float32.

    Args:
        x: (T, H), contiguous.
        weight: (num_experts, H), contiguous; of the dtype of x, or float32.
        bias: (num_experts,).

    Returns:
        (parts, T, num_experts) float32, of which the sum is meant: few tokens are too little for one program each.
    """
    (num_tokens, depth), num_experts = x.shape, len(weight)
    if num_tokens > _MAX_ROWS:
        if x.dtype is weight.dtype:
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            logits = x.to(weight.dtype) @ weight.t()
        return (logits if bias is None else logits.add_(bias)).unsqueeze(0)
    parts = max(1, min(4, depth // 512))
    out = torch.empty(parts, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    _logits[(triton.cdiv(num_experts, 16), triton.cdiv(num_tokens, 16), parts)](
        x,
        weight,
        bias,
        out,
        num_tokens,
        num_experts,
        depth,
        triton.cdiv(depth, parts),
        HAS_BIAS=bias is not None,
        ROWS=16,
        COLUMNS=16,
        BLOCK=256 if weight.itemsize == 2 else 64,
        num_stages=3,
        num_warps=4,
        **OVERLAPPING,
    )
    return out


@triton.jit(do_not_specialize=["num_tokens"])  # or every batch size would compile its own
def _logits(
    x,
    weight,
    bias,
    out,
    num_tokens,
    num_experts,
    depth,
    part_depth,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    of_weight = weight + tl.minimum(expert, num_experts - 1) * depth
    wait_for_earlier(OVERLAPS)
    of_weight = of_weight[:, None]
    of_x = x + tl.minimum(row, num_tokens - 1)[None, :] * depth
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    first = tl.program_id(2) * part_depth
    end = tl.minimum(depth, first + part_depth)
    total = add_products(of_weight, of_x, first, end, total, BLOCK, "", "ieee")
    if HAS_BIAS:
        is_added = (expert < num_experts) & (tl.program_id(2) == 0)
        total += tl.load(bias + expert, mask=is_added, other=0.0).to(tl.float32)[:, None]
    inside = (expert < num_experts)[:, None] & (row < num_tokens)[None, :]
    place = out + tl.program_id(2) * num_tokens * num_experts + row[None, :] * num_experts + expert[:, None]
    tl.store(place, total, mask=inside)
