"""Products of tokens with the weights of their experts on a GPU, in Triton; bfloat16 and float16.

Few tokens are bound by reading each chosen expert's weights once, prompts by arithmetic. Grids depend on shapes alone;
blocks that a routing does not need end at once, so all may be recorded in a CUDA graph.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_routing import Plan


@dataclass(frozen=True, slots=True)
class Gate:
    """What an expert does to its gate's outputs and the others: silu(gate) * up, or that of gpt-oss.

    Attributes:
        limit: both are clamped to it, and one is added to `up`; None: silu(gate) * up.
        alpha: factor within the sigmoid.
    """

    limit: float | None = None
    alpha: float = 1.0


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of a product computes.

    Attributes:
        columns: of the weight; of the gate and of the others each, where there is a gate.
        depth: of one iteration.
        num_stages: iterations whose weights are under way.
        num_warps: of the program.
        weight_first: the weight is the product's left operand: good for few rows.
    """

    columns: int
    depth: int
    num_stages: int
    num_warps: int
    weight_first: bool = True


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, top_k: int, gate: Gate, tile: Tile) -> Tensor:
    """Multiply each token with the first weight of its experts, and apply the gate.

    Args:
        x: (T, H), contiguous.
        weight: (E, 2 * I, H), the gate's rows before the others; contiguous.
        bias: (E, 2 * I).
        plan: of the T * top_k assignments.
        top_k: experts of each token.
        gate: what follows.
        tile: what a program computes.

    Returns:
        (T * top_k, I), in the order of assignments.
    """
    return _product(x, weight, bias, plan, top_k, gate, tile)


def down(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, tile: Tile) -> Tensor:
    """Multiply each assignment with the second weight of its expert.

    Args:
        x: (T * top_k, I), contiguous, in the order of assignments.
        weight: (E, H, I), contiguous.
        bias: (E, H).
        plan: of the assignments.
        tile: what a program computes.

    Returns:
        (T * top_k, H), in the order of assignments.
    """
    return _product(x, weight, bias, plan, 1, None, tile)


def combine(x: Tensor, weights: Tensor, out: Tensor, *, adds: bool) -> None:
    """Sum up what a token's experts gave, always in the same order.

    Args:
        x: (T * top_k, H), contiguous.
        weights: (T, top_k) float32.
        out: (T, H), contiguous; written.
        adds: add to what is there.
    """
    (num_tokens, top_k), size = weights.shape, x.shape[-1]
    block = min(1024, triton.next_power_of_2(size))
    _combine[(num_tokens, triton.cdiv(size, block))](
        x, weights, out, size, TOP_K=top_k, ADDS=adds, BLOCK=block, num_warps=4, **OVERLAPPING
    )


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    divisor: int,
    gate: Gate | None,
    tile: Tile,
) -> Tensor:
    _, num_rows, depth = weight.shape
    num_columns = num_rows if gate is None else num_rows // 2
    out = torch.empty(len(plan.order), num_columns, dtype=x.dtype, device=x.device)
    limit = None if gate is None else gate.limit
    _grouped[(plan.blocks.shape[1] * triton.cdiv(num_columns, tile.columns),)](
        x,
        weight,
        bias,
        plan.order,
        plan.blocks,
        out,
        num_columns,
        plan.blocks.shape[1],
        divisor,
        limit or 0.0,
        1.0 if gate is None else gate.alpha,
        DEPTH=depth,
        HAS_BIAS=bias is not None,
        GATED=gate is not None,
        CLAMPS=limit is not None,
        WEIGHT_FIRST=tile.weight_first,
        ROWS=plan.rows,
        COLUMNS=tile.columns,
        BLOCK=tile.depth,
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        **OVERLAPPING,
    )
    return out


@triton.jit
def gated(gate, up, limit, alpha, CLAMPS: tl.constexpr):
    if CLAMPS:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        gate = gate * tl.sigmoid(gate * alpha)
    else:
        gate = gate * tl.sigmoid(gate)
    return gate * up


@triton.jit(do_not_specialize=["max_blocks"])  # or every batch size would compile its own
def _grouped(
    x,
    weight,
    bias,
    order,
    blocks,
    out,
    num_columns,
    max_blocks,
    divisor,
    limit,
    alpha,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some columns of one block of rows. A row's input is its assignment divided by `divisor`."""
    if GATED:  # else the kernel before read the plan as well, after it had waited for it
        wait_for_earlier(OVERLAPS)
    tiles = tl.cdiv(num_columns, COLUMNS)
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    expert = tl.load(blocks + block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(blocks + max_blocks + block) + tl.arange(0, ROWS)
    is_row = row < tl.load(blocks + 2 * max_blocks + block)
    assignment = tl.load(order + row, mask=is_row, other=0).to(tl.int64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    at = tl.arange(0, BLOCK)
    num_parts: tl.constexpr = 2 if GATED else 1
    # Where an expert has several blocks, they read its weights one after the other.
    POLICY: tl.constexpr = "evict_first" if ROWS <= 16 else ""
    of_weight = weight + (expert * num_parts * num_columns + tl.minimum(column, num_columns - 1)) * DEPTH
    if not GATED:
        wait_for_earlier(OVERLAPS)
    of_x = x + assignment // divisor * DEPTH
    if WEIGHT_FIRST:
        of_weight, of_x = of_weight[:, None] + at[None, :], of_x[None, :] + at[:, None]
        total = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        of_weight, of_x = of_weight[None, :] + at[:, None], of_x[:, None] + at[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_up = num_columns.to(tl.int64) * DEPTH
    total_up = total
    for start in range(0, DEPTH, BLOCK):
        if DEPTH % BLOCK == 0:
            part = tl.load(of_weight + start, eviction_policy=POLICY)
            if GATED:
                part_up = tl.load(of_weight + of_up + start, eviction_policy=POLICY)
            factors = tl.load(of_x + start)
        else:
            inside = start + at < DEPTH
            weight_mask = inside[None, :] if WEIGHT_FIRST else inside[:, None]
            x_mask = inside[:, None] if WEIGHT_FIRST else inside[None, :]
            part = tl.load(of_weight + start, mask=weight_mask, other=0.0, eviction_policy=POLICY)
            if GATED:
                part_up = tl.load(of_weight + of_up + start, mask=weight_mask, other=0.0, eviction_policy=POLICY)
            factors = tl.load(of_x + start, mask=x_mask, other=0.0)
        if WEIGHT_FIRST:
            total = tl.dot(part, factors, total)
            if GATED:
                total_up = tl.dot(part_up, factors, total_up)
        else:
            total = tl.dot(factors, part, total)
            if GATED:
                total_up = tl.dot(factors, part_up, total_up)
    if WEIGHT_FIRST:
        column, is_column = column[:, None], is_column[:, None]
        assignment, is_row = assignment[None, :], is_row[None, :]
    else:
        column, is_column = column[None, :], is_column[None, :]
        assignment, is_row = assignment[:, None], is_row[:, None]
    if HAS_BIAS:
        of_bias = bias + expert * num_parts * num_columns + column
        total += tl.load(of_bias, mask=is_column, other=0.0).to(tl.float32)
        if GATED:
            total_up += tl.load(of_bias + num_columns, mask=is_column, other=0.0).to(tl.float32)
    if GATED:
        total = gated(total, total_up, limit, alpha, CLAMPS)
    tl.store(out + assignment * num_columns + column, total.to(out.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def _combine(
    x, weights, out, size, TOP_K: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    wait_for_earlier(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(TOP_K):
        part = tl.load(x + (token * TOP_K + index) * size + at, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + token * TOP_K + index)
    if ADDS:
        total += tl.load(out + token * size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * size + at, total.to(out.dtype.element_ty), mask=inside)
