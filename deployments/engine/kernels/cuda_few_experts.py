"""Products of so few tokens that their experts seldom meet, on a GPU, in Triton; bfloat16 and float16.

Each token reads the weights of its experts for itself: no plan is needed, and one kernel does the second product and
the sum over a token's experts. For 4 tokens of a layer of Qwen3-30B-A3B both take 95 us, where the kernels of
`cuda_experts` and those around them take 106 (H100, 2026-11-27).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_experts import Gate, gated
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier


def gate_up_of_few(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, gate: Gate) -> Tensor:
    """`gate_up` of `cuda_experts` without a plan; `ids`: (T, top_k) int32."""
    (_, both, depth), (num_tokens, top_k) = weight.shape, ids.shape
    out = torch.empty(num_tokens * top_k, both // 2, dtype=x.dtype, device=x.device)
    columns, block, num_warps = 1, min(2048, triton.next_power_of_2(depth)), 4
    _gate_up_of_few[(num_tokens * top_k, triton.cdiv(both // 2, columns))](
        x,
        weight,
        bias,
        ids,
        out,
        both // 2,
        top_k,
        gate.limit or 0.0,
        gate.alpha,
        DEPTH=depth,
        HAS_BIAS=bias is not None,
        CLAMPS=gate.limit is not None,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=num_warps,
        **OVERLAPPING,
    )
    return out


def down_of_few(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    adds: bool,
) -> None:
    """`down` and `combine` of `cuda_experts` in one; `ids`: (T, top_k) int32."""
    (_, size, depth), (num_tokens, top_k) = weight.shape, ids.shape
    # Of one token there are few programs, which must each have much under way.
    columns, block, num_warps = (4, min(1024, triton.next_power_of_2(depth)), 8) if num_tokens == 1 else (4, 256, 1)
    _down_of_few[(num_tokens, triton.cdiv(size, columns))](
        x,
        weight,
        bias,
        ids,
        weights,
        out,
        size,
        DEPTH=depth,
        TOP_K=top_k,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=num_warps,
        **OVERLAPPING,
    )


@triton.jit
def _gate_up_of_few(
    x,
    weight,
    bias,
    ids,
    out,
    num_columns,
    top_k,
    limit,
    alpha,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLAMPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_earlier(OVERLAPS)
    assignment = tl.program_id(0)
    expert = tl.load(ids + assignment).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = expert * 2 * num_columns + tl.minimum(column, num_columns - 1)
    of_weight, of_up = weight + first[:, None] * DEPTH, num_columns.to(tl.int64) * DEPTH
    gate, up = tl.zeros((COLUMNS, BLOCK), tl.float32), tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in tl.static_range(0, DEPTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (at < DEPTH)[None, :]
        part = tl.load(of_weight + at[None, :], mask=inside, other=0.0)
        part_up = tl.load(of_weight + of_up + at[None, :], mask=inside, other=0.0)
        factors = tl.load(x + assignment // top_k * DEPTH + at[None, :], mask=inside, other=0.0).to(tl.float32)
        gate += part.to(tl.float32) * factors
        up += part_up.to(tl.float32) * factors
    total, total_up = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    is_column = column < num_columns
    if HAS_BIAS:
        of_bias = bias + expert * 2 * num_columns + column
        total += tl.load(of_bias, mask=is_column, other=0.0).to(tl.float32)
        total_up += tl.load(of_bias + num_columns, mask=is_column, other=0.0).to(tl.float32)
    total = gated(total, total_up, limit, alpha, CLAMPS)
    tl.store(out + assignment * num_columns + column, total.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _down_of_few(
    x,
    weight,
    bias,
    ids,
    weights,
    out,
    size,
    DEPTH: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < size
    row = tl.minimum(column, size - 1)
    wait_for_earlier(OVERLAPS)
    total, added = tl.zeros((COLUMNS, BLOCK), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for index in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + index).to(tl.int64)
        factor = tl.load(weights + token * TOP_K + index)
        of_weight = weight + (expert * size + row)[:, None] * DEPTH
        for start in tl.static_range(0, DEPTH, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = (at < DEPTH)[None, :]
            part = tl.load(of_weight + at[None, :], mask=inside, other=0.0)
            factors = tl.load(x + (token * TOP_K + index) * DEPTH + at[None, :], mask=inside, other=0.0)
            total += part.to(tl.float32) * (factors.to(tl.float32) * factor)
        if HAS_BIAS:
            added += tl.load(bias + expert * size + row).to(tl.float32) * factor
    result = tl.sum(total, axis=1) + added
    place = out + token.to(tl.int64) * size + column
    if ADDS:
        result += tl.load(place, mask=is_column, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=is_column)
