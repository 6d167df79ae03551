"""Matrix product of many rows with a weight in FP8 on a GPU, in Triton: both in FP8, as the tensor cores want them."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deployments.engine.kernels.cuda_fp8 import Fp8Weight
from deployments.engine.kernels.cuda_fp8_rows import Fp8Rows
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, ask_for, wait_for_earlier


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes at once.

    Attributes:
        rows: of x.
        columns: of the weight's rows.
        depth: of one iteration.
        num_stages: iterations that are under way.
        num_warps: of the program.
        group: tiles of rows that share a tile of the weight in the L2 cache.
        stays: a program goes on with another tile, so that there are no more of them than processors.
        weight_first: the weight is the product's left operand, of which the tensor cores take no fewer than 64 rows: so
            there may be fewer rows of x.
        ahead: of each of the weight's rows so many codes are asked for while earlier kernels end; a multiple of 128.
    """

    rows: int
    columns: int
    depth: int
    num_stages: int
    num_warps: int
    group: int = 8
    stays: bool = True
    weight_first: bool = False
    ahead: int = 0


def many_rows(x: Fp8Rows, weight: Fp8Weight, bias: Tensor | None, out: Tensor, tile: Tile, *, adds: bool) -> None:
    """Multiply many rows with a weight.

    Args:
        x: rows of K.
        weight: (N, K).
        bias: (N,).
        out: (..., N), contiguous; written.
        tile: what a program computes; of the depth of a scale, where a row of the weight has several.
        adds: add to what is there.
    """
    num_columns, depth = weight.codes.shape
    num_rows = len(x.codes)
    assert not weight.has_blocks or tile.depth == weight.scales.depth, (tile, weight.scales.depth)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns)
    num_programs = min(num_tiles, _num_processors(x.codes.device)) if tile.stays else num_tiles
    _fp8_by_fp8[(num_programs,)](
        TensorDescriptor.from_tensor(x.padded, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight.codes, [tile.columns, tile.depth]),
        weight.codes,
        x.scales,
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
        HAS_BLOCKS=weight.has_blocks,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK=tile.depth,
        GROUP=tile.group,
        STAYS=tile.stays,
        WEIGHT_FIRST=tile.weight_first,
        AHEAD=0 if tile.stays or depth < tile.ahead else tile.ahead,
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        **OVERLAPPING,
    )


def many_rows_of_library(x: Fp8Rows, weight: Fp8Weight, bias: Tensor | None, out: Tensor) -> None:
    """As `many_rows`, by torch's own product: for weights with one scale a row, in bfloat16, and nothing is added."""
    assert not weight.has_blocks and weight.scales.rows == 1 and out.dtype is torch.bfloat16
    torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        x.scales,
        weight.scales.values.t(),
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out.view(-1, out.shape[-1]),
    )


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _place(tile, tiles_down, tiles_across, GROUP: tl.constexpr):
    """Row and column of a tile: groups of rows share columns."""
    per_group = GROUP * tiles_across
    first = tile // per_group * GROUP
    height = tl.minimum(tiles_down - first, GROUP)
    return first + tile % per_group % height, tile % per_group // height


@triton.jit(do_not_specialize=["num_rows"])  # which prompts have of any number
def _fp8_by_fp8(
    x,
    weight,
    codes,
    of_rows,
    of_columns,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    scales_across,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STAYS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    tiles_down, tiles_across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    if OVERLAPS and AHEAD:
        _, across = _place(tl.program_id(0), tiles_down, tiles_across, GROUP)
        columns = tl.minimum(across * COLUMNS + tl.arange(0, COLUMNS), num_columns - 1).to(tl.int64)
        ask_for(codes + columns[:, None] * depth + tl.arange(0, AHEAD // 128)[None, :] * 128)
    wait_for_earlier(OVERLAPS)
    if STAYS:
        for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, tl.num_programs(0), flatten=True):
            _tile(
                tile, tiles_down, tiles_across, x, weight, of_rows, of_columns, bias, out, num_rows, num_columns, depth,
                scales_across, HAS_BIAS, ADDS, ROWS_PER_SCALE, HAS_BLOCKS, ROWS, COLUMNS, BLOCK, GROUP, WEIGHT_FIRST,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), tiles_down, tiles_across, x, weight, of_rows, of_columns, bias, out, num_rows,
            num_columns, depth, scales_across, HAS_BIAS, ADDS, ROWS_PER_SCALE, HAS_BLOCKS, ROWS, COLUMNS, BLOCK, GROUP,
            WEIGHT_FIRST,
        )  # fmt: skip


@triton.jit
def _tile(
    tile,
    tiles_down,
    tiles_across,
    x,
    weight,
    of_rows,
    of_columns,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    scales_across,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):
    down, across = _place(tile, tiles_down, tiles_across, GROUP)
    rows = down * ROWS + tl.arange(0, ROWS)
    columns = across * COLUMNS + tl.arange(0, COLUMNS)
    kept = tl.minimum(columns, num_columns - 1)
    scales = of_columns + kept // ROWS_PER_SCALE * scales_across
    total = tl.zeros((COLUMNS if WEIGHT_FIRST else ROWS, ROWS if WEIGHT_FIRST else COLUMNS), tl.float32)
    for step in range(tl.cdiv(depth, BLOCK)):
        a = x.load([down * ROWS, step * BLOCK])
        b = weight.load([across * COLUMNS, step * BLOCK])
        if HAS_BLOCKS:
            scale = tl.load(scales + step)
            if WEIGHT_FIRST:
                total += tl.dot(b, a.T) * scale[:, None]
            else:
                total += tl.dot(a, b.T) * scale[None, :]
        elif WEIGHT_FIRST:
            total = tl.dot(b, a.T, total)
        else:
            total = tl.dot(a, b.T, total)
    if WEIGHT_FIRST:
        total = total.T
    if not HAS_BLOCKS:
        total *= tl.load(scales)[None, :]
    total *= tl.load(of_rows + rows, mask=rows < num_rows, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    places = out + rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if ADDS:
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, total.to(out.dtype.element_ty), mask=inside)
