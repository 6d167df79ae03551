"""Matrix product of many rows with a weight in FP8 on a GPU, in Triton: both are in FP8, as the tensor cores want them.

Each row of x is rounded to codes with a scale of its own when it comes, by a kernel of its own or by the activation
before the product.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deployments.engine.kernels.cuda import normalised
from deployments.engine.kernels.cuda_fp8 import Fp8Weight
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.fp8 import FP8


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows of numbers in FP8.

    Attributes:
        codes: (T, K) float8_e4m3fn, contiguous.
        scales: (T, 1) float32.
        shape: that the rows had.
        dtype: that the numbers had.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    dtype: torch.dtype


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
    """

    rows: int
    columns: int
    depth: int
    num_stages: int
    num_warps: int
    group: int = 8
    stays: bool = True
    weight_first: bool = False


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Round each row to codes.

    Args:
        x: (..., K), contiguous.
    """
    size = x.shape[-1]
    rows = _empty_rows(x.shape, x.dtype, x.device)
    block = triton.next_power_of_2(size)
    _quantize_rows[(len(rows.codes),)](
        x, rows.codes, rows.scales, size, BLOCK=block, num_warps=_num_warps(block), **OVERLAPPING
    )
    return rows


def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """The norm of each row, rounded to codes; see `rms_norm`.

    Args:
        x: (..., N), contiguous.
        weight: (N,).
        eps: added to the mean square.
    """
    size = x.shape[-1]
    rows = _empty_rows(x.shape, x.dtype, x.device)
    block = triton.next_power_of_2(size)
    _rms_norm_quantized[(len(rows.codes),)](
        x, weight, rows.codes, rows.scales, eps, size, BLOCK=block, num_warps=_num_warps(block), **OVERLAPPING
    )
    return rows


def silu_mul_quantized(gate_up: Tensor) -> Fp8Rows:
    """SwiGLU's activation, rounded to codes.

    Args:
        gate_up: (..., 2 * N), the gate's outputs before the others; contiguous.

    Returns:
        Rows of N.
    """
    return _gated(gate_up, is_gelu=False)


def gelu_mul_quantized(gate_up: Tensor) -> Fp8Rows:
    """GeGLU's activation, rounded to codes; see `silu_mul_quantized`."""
    return _gated(gate_up, is_gelu=True)


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
        TensorDescriptor.from_tensor(x.codes, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight.codes, [tile.columns, tile.depth]),
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


def _gated(gate_up: Tensor, is_gelu: bool) -> Fp8Rows:
    size = gate_up.shape[-1] // 2
    rows = _empty_rows(torch.Size((*gate_up.shape[:-1], size)), gate_up.dtype, gate_up.device)
    block = triton.next_power_of_2(size)
    _gated_quantized[(len(rows.codes),)](
        gate_up,
        rows.codes,
        rows.scales,
        size,
        IS_GELU=is_gelu,
        BLOCK=block,
        num_warps=_num_warps(block),
        **OVERLAPPING,
    )
    return rows


def _empty_rows(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Fp8Rows:
    size = shape[-1]
    num_rows = shape.numel() // size
    codes = torch.empty((num_rows, size), dtype=FP8, device=device)
    return Fp8Rows(codes, torch.empty((num_rows, 1), dtype=torch.float32, device=device), shape, dtype)


def _num_warps(block: int) -> int:
    return 16 if block >= 16384 else 8 if block >= 4096 else 4 if block >= 1024 else 1


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _store_codes(value, codes, scales, row, at, inside, size):
    """Round a row of float32; one of zeros has a scale that is not."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=0) / 448.0, 7.888609052210118e-31)
    tl.store(scales + row, scale)
    tl.store(codes + row * size + at, (value / scale).to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_rows(x, codes, scales, size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    _store_codes(value, codes, scales, row, at, inside, size)


@triton.jit
def _rms_norm_quantized(x, weight, codes, scales, eps, size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0)
    normed = normalised(value.to(tl.float32), weight, at, inside, eps, size, value.dtype)
    _store_codes(normed.to(tl.float32), codes, scales, row, at, inside, size)


@triton.jit
def _gated_quantized(gate_up, codes, scales, size, IS_GELU: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0)
    if IS_GELU:
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = gate * tl.sigmoid(gate)
    _store_codes((activated.to(up.dtype) * up).to(tl.float32), codes, scales, row, at, inside, size)


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
    OVERLAPS: tl.constexpr,
):
    wait_for_earlier(OVERLAPS)
    tiles_down, tiles_across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
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
