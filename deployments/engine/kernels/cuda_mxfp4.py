"""Products of tokens with weights of their experts that are kept in MXFP4, in Triton; bfloat16 and float16 tokens.

A quarter of the bytes of bfloat16 is read. Codes become numbers in registers, which are the left operand of the tensor
cores; all of it is exact. Grids and plans are those of `cuda_experts`.

The widening must not cost more than the reading, so codes lie in the order of `mxfp4_words`: 16 bits hold the codes of
numbers that are 32 apart, those of a neighbour fill the other half of a register, and both become bfloat16 by two masks
and one product with their scale.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_experts import Gate, gated
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_routing import Plan
from deployments.engine.kernels.mxfp4_words import Packed

# Of $4, two words, and $5, the multipliers of their row, which the compiler finds to be the same for all of its words.
# $0 to $3 are written before the last of $4 and $5 is read.
_WIDEN = tl.constexpr(
    """{
    .reg .b32 even, odd, factor, sign, rest, none;
    mov.b32 none, 0x80008000;
    shl.b32 even, $5, 7;
    shr.b32 odd, $5, 1;

    prmt.b32 factor, even, even, 0x1010;
    and.b32 factor, factor, 0x7F807F80;
    and.b32 rest, $4, 0x81C081C0;
    fma.rn.bf16x2 $0, rest, factor, none;

    prmt.b32 factor, odd, odd, 0x1010;
    and.b32 factor, factor, 0x7F807F80;
    shl.b32 sign, $4, 1;
    shl.b32 rest, $4, 3;
    and.b32 rest, rest, 0x01C001C0;
    and.b32 sign, sign, 0x80008000;
    or.b32 rest, rest, sign;
    fma.rn.bf16x2 $1, rest, factor, none;

    prmt.b32 factor, even, even, 0x3232;
    and.b32 factor, factor, 0x7F807F80;
    shl.b32 rest, $4, 6;
    and.b32 rest, rest, 0x81C081C0;
    fma.rn.bf16x2 $2, rest, factor, none;

    prmt.b32 factor, odd, odd, 0x3232;
    and.b32 factor, factor, 0x7F807F80;
    shl.b32 sign, $4, 2;
    shr.b32 rest, $4, 4;
    and.b32 rest, rest, 0x01C001C0;
    and.b32 sign, sign, 0x80008000;
    or.b32 rest, rest, sign;
    fma.rn.bf16x2 $3, rest, factor, none;
    }"""
)
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")


@dataclass(frozen=True, slots=True)
class PackedTile:
    """What one program computes.

    Attributes:
        columns: of the weight; of the gate and of the others each, where there is a gate.
        num_stages: iterations whose weights are under way.
        num_warps: of the program.
    """

    columns: int
    num_stages: int
    num_warps: int


_TILE = PackedTile(64, 3, 4)  # the best of those tried on an H200, for blocks of all sizes


def packed_rows(rows_per_expert: float) -> int:
    """The most rows of a block: the best of those tried on an H200 (docs/log.md)."""
    return next((rows for most, rows in ((8, 16), (32, 32), (96, 64)) if rows_per_expert <= most), 128)


def packed_product(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    plan: Plan,
    divisor: int,
    gate: Gate | None,
    tile: PackedTile = _TILE,
) -> Tensor:
    """Multiply rows with the weights of their experts, and apply the gate.

    Args:
        x: (T, depth), contiguous; a row's input is its assignment divided by `divisor`.
        weight: with a gate its rows before the others.
        bias: (E, rows).
        plan: of the assignments.
        divisor: experts of each token where `x` has tokens, 1 where it has assignments.
        gate: what follows; None: nothing.
        tile: what a program computes.

    Returns:
        (assignments, rows), or half as many with a gate, in the order of assignments.
    """
    num_columns = weight.words.shape[2] // (1 if gate is None else 2)
    out = torch.empty(len(plan.order), num_columns, dtype=x.dtype, device=x.device)
    limit = None if gate is None else gate.limit
    _packed[(plan.blocks.shape[1] * triton.cdiv(num_columns, tile.columns),)](
        x,
        weight.words,
        weight.multipliers,
        bias,
        plan.order,
        plan.blocks,
        out,
        num_columns,
        plan.blocks.shape[1],
        divisor,
        limit or 0.0,
        1.0 if gate is None else gate.alpha,
        DEPTH=weight.depth,
        HAS_BIAS=bias is not None,
        GATED=gate is not None,
        CLAMPS=limit is not None,
        IN_PAIRS=x.dtype is torch.bfloat16 and not triton.knobs.runtime.interpret,
        ROWS=plan.rows,
        COLUMNS=tile.columns,
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        **OVERLAPPING,
    )
    return out


@triton.jit(do_not_specialize=["max_blocks"])  # or every batch size would compile its own
def _packed(
    x,
    words,
    multipliers,
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
    IN_PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some columns of one block of rows."""
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
    NUM_PARTS: tl.constexpr = 2 if GATED else 1
    NUM_BLOCKS: tl.constexpr = (DEPTH + 127) // 128
    at = tl.arange(0, 32)
    first = expert * NUM_BLOCKS * NUM_PARTS * num_columns + tl.minimum(column, num_columns - 1)
    of_words = words + first[:, None] * 32 + at[None, :]
    of_multipliers = multipliers + first
    if not GATED:
        wait_for_earlier(OVERLAPS)
    of_x = x + (assignment // divisor * DEPTH)[None, :] + at[:, None]
    total, total_up = _accumulate(
        of_words, of_multipliers, of_x, is_row, num_columns, DEPTH, GATED, IN_PAIRS, ROWS, COLUMNS
    )
    is_stored = is_column[:, None] & is_row[None, :]
    if HAS_BIAS:
        of_bias = bias + expert * NUM_PARTS * num_columns + column
        total += tl.load(of_bias, mask=is_column, other=0.0).to(tl.float32)[:, None]
        if GATED:
            total_up += tl.load(of_bias + num_columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    if GATED:
        total = gated(total, total_up, limit, alpha, CLAMPS)
    place = out + assignment[None, :] * num_columns + column[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_stored)


@triton.jit
def _accumulate(
    of_words,
    of_multipliers,
    of_x,
    is_row,
    num_columns,
    DEPTH: tl.constexpr,
    GATED: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum up, over the depth, the product with some rows of a weight, and with those `num_columns` behind if GATED."""
    NUM_PARTS: tl.constexpr = 2 if GATED else 1
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    total_up = total
    for start in range(0, DEPTH, 128):
        x0 = _load(of_x, is_row, start, DEPTH)
        x1 = _load(of_x, is_row, start + 32, DEPTH)
        x2 = _load(of_x, is_row, start + 64, DEPTH)
        x3 = _load(of_x, is_row, start + 96, DEPTH)
        total = _multiply(of_words, of_multipliers, x0, x1, x2, x3, total, IN_PAIRS)
        if GATED:
            total_up = _multiply(
                of_words + num_columns * 32, of_multipliers + num_columns, x0, x1, x2, x3, total_up, IN_PAIRS
            )
        of_words += NUM_PARTS * num_columns * 32
        of_multipliers += NUM_PARTS * num_columns
    return total, total_up


@triton.jit
def _load(of_x, is_row, start, DEPTH: tl.constexpr):
    """32 numbers of each row, all or none of which are before the end."""
    return tl.load(of_x + start, mask=(start < DEPTH) & is_row[None, :], other=0.0)


@triton.jit
def _multiply(of_words, of_multipliers, x0, x1, x2, x3, total, IN_PAIRS: tl.constexpr):
    """Add the product with a block of each row of a weight."""
    words, fields = tl.load(of_words), tl.load(of_multipliers)
    if IN_PAIRS:
        part0, part1, part2, part3 = _widen_pairs(words, fields[:, None])
    else:
        part0, part1 = _widen(words, fields, 0).to(x0.dtype), _widen(words, fields, 1).to(x0.dtype)
        part2, part3 = _widen(words, fields, 2).to(x0.dtype), _widen(words, fields, 3).to(x0.dtype)
    total = tl.dot(part0, x0, total)
    total = tl.dot(part1, x1, total)
    total = tl.dot(part2, x2, total)
    return tl.dot(part3, x3, total)


@triton.jit
def _widen_pairs(words, fields):
    """Four bfloat16 numbers of each word, two words at a time: the low and the high half of a register.

    A code's sign becomes that of the number, its other three bits the lowest two of the exponent and the highest of the
    mantissa.
    """
    return tl.inline_asm_elementwise(
        _WIDEN,
        _REGISTERS,
        [words, fields],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _widen(words, fields, INDEX: tl.constexpr):
    """Float32 numbers of one code of each word: without an exponent a code is 0 or 0.5."""
    SIGN: tl.constexpr = (15, 14, 9, 13)[INDEX]  # as `mxfp4_words` says
    REST: tl.constexpr = (6, 3, 0, 10)[INDEX]
    bits = words.to(tl.int32)
    sign, magnitude = (bits >> SIGN) & 1, (bits >> REST) & 7
    # Of a half, in the bits of a float32; smaller ones are 0 in float16.
    exponent = tl.maximum(((fields >> (8 * INDEX)) & 255) - 127, 0)[:, None] << 23
    bits = tl.where(magnitude < 2, magnitude * exponent, (magnitude << 22) + exponent)
    return (bits | (sign << 31)).to(tl.float32, bitcast=True)
