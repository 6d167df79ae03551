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
    num_parts: tl.constexpr = 2 if GATED else 1
    # Where an expert has several blocks, they read its weights one after the other.
    POLICY: tl.constexpr = "evict_first" if ROWS <= 16 else ""
    of_weight = weight + (expert * num_parts * num_columns + tl.minimum(column, num_columns - 1)) * DEPTH
    if not GATED:
        wait_for_earlier(OVERLAPS)
    of_weight, of_x = _laid_out(of_weight, x + assignment // divisor * DEPTH, WEIGHT_FIRST)
    total, total_up = _accumulate(
        of_weight, num_columns.to(tl.int64) * DEPTH, of_x, COLUMNS, ROWS, DEPTH, BLOCK, GATED, WEIGHT_FIRST, POLICY
    )
    column, assignment = _laid_out(column, assignment, WEIGHT_FIRST)
    is_column, is_row = _laid_out(is_column, is_row, WEIGHT_FIRST)
    if HAS_BIAS:
        of_bias = bias + expert * num_parts * num_columns + column
        total += tl.load(of_bias, mask=is_column, other=0.0).to(tl.float32)
        if GATED:
            total_up += tl.load(of_bias + num_columns, mask=is_column, other=0.0).to(tl.float32)
    if GATED:
        total = gated(total, total_up, limit, alpha, CLAMPS)
    tl.store(out + assignment * num_columns + column, total.to(out.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def _laid_out(columns, rows, WEIGHT_FIRST: tl.constexpr):
    """What belongs to columns and to rows, along the axes that they have in the product."""
    if WEIGHT_FIRST:
        columns, rows = columns[:, None], rows[None, :]
    else:
        columns, rows = columns[None, :], rows[:, None]
    return columns, rows


@triton.jit
def _accumulate(
    of_weight,
    of_up,
    of_x,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Sum up, over the depth, the product with the columns at `of_weight`, and with those `of_up` behind if GATED."""
    at = tl.arange(0, BLOCK)
    # In each operand the depth lies along the other one's axis.
    at_of_x, at_of_weight = _laid_out(at, at, WEIGHT_FIRST)
    of_weight, of_x = of_weight + at_of_weight, of_x + at_of_x
    total = tl.zeros((COLUMNS, ROWS) if WEIGHT_FIRST else (ROWS, COLUMNS), tl.float32)
    total_up = total
    IS_WHOLE: tl.constexpr = DEPTH % BLOCK == 0
    for start in range(0, DEPTH, BLOCK):
        inside = start + at < DEPTH
        is_in_x, is_in_weight = _laid_out(inside, inside, WEIGHT_FIRST)
        part = _load(of_weight + start, is_in_weight, IS_WHOLE, POLICY)
        if GATED:
            part_up = _load(of_weight + of_up + start, is_in_weight, IS_WHOLE, POLICY)
        factors = _load(of_x + start, is_in_x, IS_WHOLE, "")
        total = _dot(part, factors, total, WEIGHT_FIRST)
        if GATED:
            total_up = _dot(part_up, factors, total_up, WEIGHT_FIRST)
    return total, total_up


@triton.jit
def _load(place, inside, IS_WHOLE: tl.constexpr, POLICY: tl.constexpr):
    if IS_WHOLE:
        part = tl.load(place, eviction_policy=POLICY)
    else:
        part = tl.load(place, mask=inside, other=0.0, eviction_policy=POLICY)
    return part


@triton.jit
def _dot(part, factors, total, WEIGHT_FIRST: tl.constexpr):
    return tl.dot(part, factors, total) if WEIGHT_FIRST else tl.dot(factors, part, total)


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
