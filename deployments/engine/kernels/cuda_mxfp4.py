"""Products of tokens with weights of their experts that are kept in MXFP4, in Triton; bfloat16 and float16 tokens.

A quarter of the bytes of bfloat16 is read. Codes become numbers in registers: their bits are put where a float32 has
its own, the scale added to the exponent, so all of it is exact. Two codes share a byte; the earlier and the later ones
are multiplied apart, with tokens' numbers of even and odd places, so that nothing has to change places in registers.

Grids and plans are those of `cuda_experts`. Half as fast as that in bfloat16 (H200, gpt-oss-20b's shape): widening
binds it, not what is read. So it saves memory alone, and `engine.quantization=mxfp4` asks for it.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_experts import Gate, gated
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_routing import Plan
from deployments.engine.kernels.mxfp4 import Mxfp4

_COLUMNS = 64
_DEPTH = 128  # of one iteration


def packed_product(
    x: Tensor, weight: Mxfp4, bias: Tensor | None, plan: Plan, divisor: int, gate: Gate | None
) -> Tensor:
    """Multiply rows with the weights of their experts, and apply the gate.

    Args:
        x: (T, depth), contiguous; a row's input is its assignment divided by `divisor`.
        weight: with a gate its rows before the others.
        bias: (E, rows).
        plan: of the assignments.
        divisor: experts of each token where `x` has tokens, 1 where it has assignments.
        gate: what follows; None: nothing.

    Returns:
        (assignments, rows), or half as many with a gate, in the order of assignments.
    """
    num_columns = weight.codes.shape[1] // (1 if gate is None else 2)
    out = torch.empty(len(plan.order), num_columns, dtype=x.dtype, device=x.device)
    limit = None if gate is None else gate.limit
    _packed[(plan.blocks.shape[1] * triton.cdiv(num_columns, _COLUMNS),)](
        x,
        weight.codes,
        weight.scales,
        bias,
        plan.order,
        plan.blocks,
        out,
        num_columns,
        plan.blocks.shape[1],
        divisor,
        limit or 0.0,
        1.0 if gate is None else gate.alpha,
        DEPTH=x.shape[1],
        HAS_BIAS=bias is not None,
        GATED=gate is not None,
        CLAMPS=limit is not None,
        ROWS=plan.rows,
        COLUMNS=_COLUMNS,
        BLOCK=_DEPTH,
        num_stages=4,
        num_warps=4 if plan.rows <= 32 else 8,
        **OVERLAPPING,
    )
    return out


@triton.jit(do_not_specialize=["max_blocks"])  # or every batch size would compile its own
def _packed(
    x,
    codes,
    scales,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some columns of one block of rows."""
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
    of_row = expert * num_parts * num_columns + tl.minimum(column, num_columns - 1)
    of_x = x + (assignment // divisor * DEPTH)[None, :]
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    total_up = total
    at = tl.arange(0, BLOCK // 2)
    for start in range(0, DEPTH, BLOCK):
        place = start // 2 + at
        inside = place < DEPTH // 2
        even = tl.load(of_x + 2 * place[:, None], mask=inside[:, None], other=0.0)
        odd = tl.load(of_x + 2 * place[:, None] + 1, mask=inside[:, None], other=0.0)
        total = _multiply(codes, scales, of_row, place, inside, even, odd, total, DEPTH)
        if GATED:
            total_up = _multiply(codes, scales, of_row + num_columns, place, inside, even, odd, total_up, DEPTH)
    is_stored = is_column[:, None] & is_row[None, :]
    if HAS_BIAS:
        of_bias = bias + expert * num_parts * num_columns + column
        total += tl.load(of_bias, mask=is_column, other=0.0).to(tl.float32)[:, None]
        if GATED:
            total_up += tl.load(of_bias + num_columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    if GATED:
        total = gated(total, total_up, limit, alpha, CLAMPS)
    place = out + assignment[None, :] * num_columns + column[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_stored)


@triton.jit
def _multiply(codes, scales, of_row, place, inside, even, odd, total, DEPTH: tl.constexpr):
    """Add the product with some bytes of each row of a weight."""
    byte = tl.load(codes + of_row[:, None] * (DEPTH // 2) + place[None, :], mask=inside[None, :], other=0).to(tl.int32)
    scale = tl.load(scales + of_row[:, None] * (DEPTH // 32) + place[None, :] // 16, mask=inside[None, :], other=1)
    exponent = (scale.to(tl.int32) - 1) << 23  # of a half, in the bits of a float32
    total = tl.dot(_widen(byte & 15, exponent).to(even.dtype), even, total)
    return tl.dot(_widen(byte >> 4, exponent).to(odd.dtype), odd, total)


@triton.jit
def _widen(code, exponent):
    """Float32 numbers of codes: a sign, two bits of exponent, one of mantissa. Without an exponent it is 0 or 0.5."""
    magnitude = code & 7
    bits = tl.where(magnitude < 2, magnitude * exponent, (magnitude << 22) + exponent)
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)
