"""Matrix product of few rows on a GPU, in Triton: bound by reading the weight once; bfloat16 and float16."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_step_products import StepTile, multiply_rows, step_tile

# Products of more rows are torch's, but for those with small weights: cuBLAS is then bound by arithmetic and better at
# it, with many columns later.
_MAX_ROWS, _MAX_ROWS_OF_WIDE, _WIDE = 32, 64, 16384


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product for few rows, which is bound by reading the weight once.

    Args:
        x: (..., K), contiguous.
        weight: (N, K), contiguous.
        bias: (N,).

    Returns:
        (..., N).
    """
    tile = _step_tile(x, weight)
    if tile is None and not _is_skinny(x, weight):
        return functional.linear(x, weight, bias)
    out = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype, device=x.device)
    if tile is not None:
        multiply_rows(x, weight, bias, out, tile, adds=False)
    else:
        _product(x, weight, bias, out, adds=False)
    return out


def add_linear(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add the product of x and the weight in place, within the product's own pass over its output.

    Args:
        residual: (..., N), contiguous.
        x: (..., K), contiguous.
        weight: (N, K), contiguous.
        bias: (N,), added as well.

    Returns:
        The residual.
    """
    if (tile := _step_tile(x, weight)) is not None:
        multiply_rows(x, weight, bias, residual, tile, adds=True)
    elif _is_skinny(x, weight):
        _product(x, weight, bias, residual, adds=True)
    else:
        if bias is not None:
            residual += bias
        residual.view(-1, len(weight)).addmm_(x.view(-1, x.shape[-1]), weight.t())
    return residual


def _step_tile(x: Tensor, weight: Tensor) -> StepTile | None:
    num_columns, depth = weight.shape
    return step_tile(num_columns, depth, x.numel() // depth)


def _is_skinny(x: Tensor, weight: Tensor) -> bool:
    num_columns, depth = weight.shape
    return x.numel() // depth <= (_MAX_ROWS_OF_WIDE if num_columns >= _WIDE else _MAX_ROWS) and depth % 8 == 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, adds: bool) -> None:
    num_rows = x.numel() // x.shape[-1]
    if num_rows == 1:
        _product_of_row(x, weight, bias, out, adds)
    elif num_rows:
        _product_of_rows(x, weight, bias, out, num_rows, adds)


def _product_of_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, adds: bool) -> None:
    num_columns, depth = weight.shape
    columns, block, num_warps = row_tile(depth)
    _linear_of_row[(triton.cdiv(num_columns, columns),)](
        x,
        weight,
        bias,
        out,
        num_columns,
        depth,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=num_warps,
        **OVERLAPPING,
    )


def _product_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_rows: int, adds: bool) -> None:
    num_columns, depth = weight.shape
    rows = max(16, triton.next_power_of_2(num_rows))
    columns, block, num_stages, num_warps = skinny_tile(num_columns, rows)
    _linear_of_rows[(triton.cdiv(num_columns, columns),)](
        x,
        weight,
        bias,
        out,
        num_rows,
        num_columns,
        depth,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=block,
        num_stages=num_stages,
        num_warps=num_warps,
        **OVERLAPPING,
    )


def row_tile(depth: int) -> tuple[int, int, int]:
    """Columns and depth of a program's tile, and its warps, where there is one row."""
    return (2, 1024, 4) if depth <= 1024 else (2, 2048, 8)


def skinny_tile(num_columns: int, num_rows: int) -> tuple[int, int, int, int]:
    """Columns and depth of a program's tile, its stages and warps: the best of those tried on an H100 (docs/log.md).

    Args:
        num_columns: of the weight.
        num_rows: of the tile: 16, 32 or 64.
    """
    if num_columns <= 2048:  # narrow tiles, so that there are enough programs
        return 16, 512 if num_rows == 16 else 256, 3, 4
    if num_columns <= 4096:
        return 32, 256, 5 if num_rows <= 32 else 3, 4
    return (64, 256, 3, 4) if num_rows == 16 else (64, 128, 5, 4)


@triton.jit
def _linear_of_row(
    x,
    weight,
    bias,
    out,
    num_columns,
    depth,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = weight + tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None] * depth
    at = tl.arange(0, BLOCK)
    inside = at < depth
    # Nothing but x comes from earlier kernels: the first part of the weight is on its way while they end.
    part = tl.load(rows + at[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
    wait_for_earlier(OVERLAPS)
    total = part.to(tl.float32) * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(BLOCK, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < depth
        part = tl.load(rows + at[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        total += part.to(tl.float32) * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    if ADDS:
        result += tl.load(out + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(out + columns, result, mask=columns < num_columns)


@triton.jit
def _linear_of_rows(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_earlier(OVERLAPS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    of_weight = weight + tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None] * depth
    of_x = x + tl.minimum(rows, num_rows - 1)[None, :] * depth
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    total = add_products(of_weight, of_x, 0, depth, total, BLOCK, "evict_first", "tf32")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[:, None]
    places = out + rows[None, :].to(tl.int64) * num_columns + columns[:, None]
    inside = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    if ADDS:
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, total, mask=inside)


@triton.jit
def add_products(
    of_weight,
    of_x,
    first,
    end,
    total,
    BLOCK: tl.constexpr,
    POLICY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add products over the depth from `first` to `end`: of (columns, 1) and (1, rows) pointers, to (columns, rows)."""
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        part = tl.load(of_weight + at[None, :], mask=inside[None, :], other=0.0, eviction_policy=POLICY)
        factors = tl.load(of_x + at[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(part, factors.to(part.dtype), total, input_precision=PRECISION)
    return total
