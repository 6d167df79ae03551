"""Matrix product of few rows with a weight in FP8 on a GPU, in Triton: bound by reading the weight once.

Weights are read as they are stored and multiplied in the type of x (bfloat16, float16), which holds every code; scales
are applied to sums in float32. So nothing is lost beyond what the weight lost.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.fp8 import Scales


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight in FP8.

    Attributes:
        codes: (N, K) float8_e4m3fn, contiguous; N and K are multiples of 16.
        scales: of the codes: tiles are rows, or of 128 columns.
    """

    codes: Tensor
    scales: Scales

    @property
    def has_blocks(self) -> bool:
        """Whether a row has several scales."""
        return self.scales.values.shape[1] > 1


def few_rows(x: Tensor, weight: Fp8Weight, bias: Tensor | None, out: Tensor, *, adds: bool) -> None:
    """Multiply few rows with a weight.

    Args:
        x: (..., K), contiguous.
        weight: (N, K).
        bias: (N,).
        out: (..., N), contiguous; written.
        adds: add to what is there.
    """
    num_rows = x.numel() // x.shape[-1]
    if num_rows == 1 and not weight.has_blocks:
        _of_row(x, weight, bias, out, adds)
    elif num_rows:
        _of_rows(x, weight, bias, out, num_rows, adds)


# Columns and depth of a program's tile, and its warps, for one row: the best of those tried on an H100 (docs/log.md).
_ROW_TILE = 2, 1024, 2


def rows_tile(num_columns: int, num_rows: int) -> tuple[int, int, int, int]:
    """Columns and depth of a program's tile, its stages and warps: the best of those tried on an H100 (docs/log.md).

    Args:
        num_columns: of the weight.
        num_rows: of the tile: 16, 32 or 64.
    """
    if num_rows == 16:
        return (16, 512, 4, 2) if num_columns <= 4096 else (32, 256, 4, 2)
    if num_columns <= 4096:
        return (32, 512, 4, 4) if num_rows == 32 else (64, 256, 4, 4)
    return (64, 256, 4, 4) if num_columns < 16384 else (64, 128, 5, 4)


def _of_row(x: Tensor, weight: Fp8Weight, bias: Tensor | None, out: Tensor, adds: bool) -> None:
    num_columns, depth = weight.codes.shape
    columns, block, num_warps = _ROW_TILE
    _fp8_of_row[(triton.cdiv(num_columns, columns),)](
        x,
        weight.codes,
        weight.scales.values,
        bias,
        out,
        num_columns,
        depth,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        ROWS_PER_SCALE=weight.scales.rows,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=num_warps,
        **OVERLAPPING,
    )


def _of_rows(x: Tensor, weight: Fp8Weight, bias: Tensor | None, out: Tensor, num_rows: int, adds: bool) -> None:
    num_columns, depth = weight.codes.shape
    rows = max(16, triton.next_power_of_2(num_rows))
    columns, block, num_stages, num_warps = rows_tile(num_columns, rows)
    if weight.has_blocks:
        block = min(block, weight.scales.depth)
    _fp8_of_rows[(triton.cdiv(num_columns, columns),)](
        x,
        weight.codes,
        weight.scales.values,
        bias,
        out,
        num_rows,
        num_columns,
        depth,
        weight.scales.values.shape[1],
        HAS_BIAS=bias is not None,
        ADDS=adds,
        ROWS_PER_SCALE=weight.scales.rows,
        DEPTH_PER_SCALE=weight.scales.depth if weight.has_blocks else 0,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=block,
        num_stages=num_stages,
        num_warps=num_warps,
        **OVERLAPPING,
    )


# Codes to as many bfloat16 numbers: sign, exponent and mantissa are moved to where they belong, which makes each number
# too small by 2**120 (the types' exponents count from 7 and 127), also those below the least normal one. Hopper has
# an instruction for conversion to float16 alone, and converts from there on at half the speed of memory.
_WIDEN_2 = tl.constexpr("""{
    .reg .b32 high, sign;
    prmt.b32 high, $1, 0, 0x1404;
    and.b32 sign, high, 0x80008000;
    shr.b32 high, high, 4;
    lop3.b32 high, high, 0x07f007f0, sign, 0xea;
    mov.b32 sign, 0x7b807b80;
    mul.rn.bf16x2 $0, high, sign;
}""")
_WIDEN_4 = tl.constexpr("""{
    .reg .b32 high, sign, power;
    mov.b32 power, 0x7b807b80;
    prmt.b32 high, $2, 0, 0x1404;
    and.b32 sign, high, 0x80008000;
    shr.b32 high, high, 4;
    lop3.b32 high, high, 0x07f007f0, sign, 0xea;
    mul.rn.bf16x2 $0, high, power;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 sign, high, 0x80008000;
    shr.b32 high, high, 4;
    lop3.b32 high, high, 0x07f007f0, sign, 0xea;
    mul.rn.bf16x2 $1, high, power;
}""")


@triton.jit
def _widened(codes, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes as numbers of the type of x, which holds them all."""
    if dtype == tl.bfloat16:
        # A thread finds four codes beside each other where the tile is too small for the tensor cores' wide form.
        if COLUMNS < 64:
            return tl.inline_asm_elementwise(
                _WIDEN_4, "=r,=r,r", [codes.to(tl.int8, bitcast=True)], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        return tl.inline_asm_elementwise(
            _WIDEN_2, "=r,r", [codes.to(tl.int8, bitcast=True)], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return codes.to(dtype)


@triton.jit
def _fp8_of_row(
    x,
    weight,
    scales,
    bias,
    out,
    num_columns,
    depth,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_earlier(OVERLAPS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = tl.minimum(columns, num_columns - 1)
    rows = weight + kept.to(tl.int64)[:, None] * depth
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < depth
        part = tl.load(rows + at[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        # By way of float16, which holds every code: one instruction for two of them.
        factors = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total += part.to(tl.float16).to(tl.float32) * factors[None, :]
    result = tl.sum(total, axis=1) * tl.load(scales + kept // ROWS_PER_SCALE)
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    if ADDS:
        result += tl.load(out + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(out + columns, result, mask=columns < num_columns)


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_of_rows(
    x,
    weight,
    scales,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    scales_across,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    DEPTH_PER_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_earlier(OVERLAPS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = tl.minimum(columns, num_columns - 1)
    rows = tl.arange(0, ROWS)
    of_weight = weight + kept.to(tl.int64)[:, None] * depth
    of_x = x + tl.minimum(rows, num_rows - 1)[None, :] * depth
    of_scales = scales + kept // ROWS_PER_SCALE * scales_across
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < depth
        part = tl.load(of_weight + at[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        factors = tl.load(of_x + at[:, None], mask=inside[:, None], other=0.0)
        if DEPTH_PER_SCALE:
            scale = tl.load(of_scales + start // DEPTH_PER_SCALE)
            total += tl.dot(_widened(part, factors.dtype, COLUMNS), factors) * scale[:, None]
        else:
            total = tl.dot(_widened(part, factors.dtype, COLUMNS), factors, total)
    if not DEPTH_PER_SCALE:
        total *= tl.load(of_scales)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[:, None]
    places = out + rows[None, :].to(tl.int64) * num_columns + columns[:, None]
    inside = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    if ADDS:
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, total, mask=inside)
