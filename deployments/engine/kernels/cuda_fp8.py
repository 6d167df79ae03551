"""Matrix product of one row with a weight in FP8 on a GPU, in Triton: bound by reading the weight once.

The row stays in its own type (bfloat16, float16), and products are added up in float32. So nothing is lost beyond what
the weight lost.
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


# Columns and depth of a program's tile, and its warps: the best of those tried on an H100 (docs/log.md).
ROW_TILE = 2, 1024, 2


def one_row(x: Tensor, weight: Fp8Weight, bias: Tensor | None, out: Tensor, *, adds: bool) -> None:
    """Multiply one row with a weight; nothing, if there is none.

    Args:
        x: (..., K), contiguous.
        weight: (N, K).
        bias: (N,).
        out: (..., N), contiguous; written.
        adds: add to what is there.
    """
    num_columns, depth = weight.codes.shape
    columns, block, num_warps = ROW_TILE
    if not x.numel():
        return
    _fp8_of_row[(triton.cdiv(num_columns, columns),)](
        x,
        weight.codes,
        weight.scales.values,
        bias,
        out,
        num_columns,
        depth,
        weight.scales.values.shape[1],
        HAS_BIAS=bias is not None,
        ADDS=adds,
        ROWS_PER_SCALE=weight.scales.rows,
        DEPTH_PER_SCALE=weight.scales.depth if weight.has_blocks else 0,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=num_warps,
        **OVERLAPPING,
    )


@triton.jit
def _fp8_of_row(
    x,
    weight,
    scales,
    bias,
    out,
    num_columns,
    depth,
    scales_across,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    DEPTH_PER_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = tl.minimum(columns, num_columns - 1)
    rows = weight + kept.to(tl.int64)[:, None] * depth
    of_scales = scales + kept // ROWS_PER_SCALE * scales_across
    at = tl.arange(0, BLOCK)
    # Nothing but x comes from earlier kernels: the first part of the weight is on its way while they end.
    part = tl.load(rows + at[None, :], mask=(at < depth)[None, :], other=0.0, eviction_policy="evict_first")
    wait_for_earlier(OVERLAPS)
    total = _products(part, x, 0, of_scales, depth, DEPTH_PER_SCALE, COLUMNS, BLOCK)
    for start in range(BLOCK, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(rows + at[None, :], mask=(at < depth)[None, :], other=0.0, eviction_policy="evict_first")
        total += _products(part, x, start, of_scales, depth, DEPTH_PER_SCALE, COLUMNS, BLOCK)
    result = tl.sum(total, axis=1)
    if not DEPTH_PER_SCALE:
        result *= tl.load(of_scales)
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    if ADDS:
        result += tl.load(out + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(out + columns, result, mask=columns < num_columns)


@triton.jit
def _products(
    part,
    x,
    start,
    of_scales,
    depth,
    DEPTH_PER_SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a part of the weight and of x; where blocks have scales, the scaled sum of each."""
    at = start + tl.arange(0, BLOCK)
    factors = tl.load(x + at, mask=at < depth, other=0.0).to(tl.float32)
    # By way of float16, which holds every code: one instruction for two of them.
    products = part.to(tl.float16).to(tl.float32) * factors[None, :]
    if DEPTH_PER_SCALE:
        parts: tl.constexpr = BLOCK // DEPTH_PER_SCALE
        sums = tl.sum(tl.reshape(products, (COLUMNS, parts, DEPTH_PER_SCALE)), axis=2)
        block = start // DEPTH_PER_SCALE + tl.arange(0, parts)
        inside = (block * DEPTH_PER_SCALE < depth)[None, :]
        products = sums * tl.load(of_scales[:, None] + block[None, :], mask=inside, other=0.0)
    return products
