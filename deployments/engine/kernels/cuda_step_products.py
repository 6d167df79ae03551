"""Matrix products of a decode step's rows on a GPU, in Triton: where launching counts as much as reading the weight.

cuBLAS starts no product before the kernel in front of it has ended. These do: while it ends, each program asks the L2
cache for its part of the weight, which no earlier kernel writes. That gains most where a product takes a few
microseconds, as in models of less than a billion parameters. bfloat16 and float16.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deployments.engine.kernels.cuda_overlap import OVERLAPPING, ask_for, wait_for_earlier

# Numbers of a weight whose reading takes as long as a launch; a larger one is a matter of reading fast.
_SMALL = 8 << 20
# All run at once, one on each multiprocessor (132 of them, H100 and H200), in whatever was faster than cuBLAS.
_MAX_PROGRAMS = 132
_NARROW, _WIDER, _DEEP, _DEEPER = 1024, 2048, 2048, 8192
# Where two programs for each 64 columns and all of 64 rows may run at once, and for each half of the rows may not.
_COLUMNS_OF_DEEP = range(64 * (_MAX_PROGRAMS // 4) + 1, 64 * (_MAX_PROGRAMS // 2) + 1)


_Entry = TypeVar("_Entry")


class Gate(IntEnum):
    """What is done to a gate's outputs before they are multiplied with the others."""

    NONE = 0
    SILU = 1
    GELU = 2


@dataclass(frozen=True, slots=True)
class StepTile:
    """What a program computes at once.

    Attributes:
        rows: of x.
        columns: of the weight's rows, which are the product's left operand: at least 64.
        depth: of one iteration.
        num_stages: iterations that are under way.
        num_warps: of the program.
        splits: so many programs share the depth of a tile; whoever ends last adds up what all have found.
    """

    rows: int
    columns: int
    depth: int
    num_stages: int
    num_warps: int
    splits: int = 1


# Of up to so many rows, the best tiles of those tried on an H200 (docs/log.md), the smallest first. In turn: of small
# weights, of large ones, and of large ones with a gate, whose programs need not run at once.
_TILES = (
    (16, (StepTile(16, 64, 256, 4, 4),)),
    (32, (StepTile(32, 64, 256, 4, 4),)),
    (256, (StepTile(32, 64, 128, 5, 4), StepTile(64, 64, 128, 4, 4))),
)
_LARGE_TILES = (
    (16, (StepTile(16, 64, 256, 4, 4),)),
    (64, (StepTile(32, 64, 256, 4, 4),)),
)
_LARGE_DEEP_TILES = (
    (16, (StepTile(16, 64, 256, 4, 4),)),
    (32, (StepTile(32, 64, 256, 4, 4),)),
    # Shared by two programs it reads the weight once for all rows: 16 rather than 22 us of 14,336 x 4,096 and 48 rows.
    (64, (StepTile(64, 64, 256, 3, 4),)),
)
_LARGE_GATED_TILES = (
    (16, StepTile(16, 64, 256, 3, 4)),
    (32, StepTile(32, 64, 128, 4, 4)),
    (64, StepTile(64, 64, 128, 4, 4)),
    (128, StepTile(128, 128, 64, 4, 8)),
)


def step_tile(num_columns: int, depth: int, num_rows: int, *, is_gated: bool = False) -> StepTile | None:
    """The tile of a product; None: others are as fast.

    Args:
        num_columns: of the output.
        depth: of the weight.
        num_rows: of x.
        is_gated: the weight has a gate's rows as well.
    """
    if num_rows < 2 or depth % 8:
        return None
    is_small = num_columns * depth * (1 + is_gated) <= _SMALL
    if is_gated and not is_small:
        return _up_to(num_rows, _LARGE_GATED_TILES)
    if num_rows <= 16 and num_columns <= _NARROW:
        return None
    large = _LARGE_DEEP_TILES if depth >= _DEEPER and num_columns in _COLUMNS_OF_DEEP else _LARGE_TILES
    for tile in _up_to(num_rows, _TILES if is_small else large) or ():
        num_programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns)
        if num_programs > _MAX_PROGRAMS:
            continue
        if is_gated:  # two tiles of the weight at once
            return replace(tile, depth=128)
        gains = depth >= (_DEEP if num_columns <= _WIDER else _DEEPER)
        return replace(tile, splits=2) if gains and 2 * num_programs <= _MAX_PROGRAMS else tile
    return None


def _up_to(num_rows: int, table: tuple[tuple[int, _Entry], ...]) -> _Entry | None:
    """What a table has for so many rows."""
    return next((entry for most_rows, entry in table if num_rows <= most_rows), None)


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: StepTile, *, adds: bool) -> None:
    """Multiply the rows of a step with a weight.

    Args:
        x: (..., K), contiguous; at least one row.
        weight: (N, K), contiguous; K a multiple of 8.
        bias: (N,).
        out: (..., N), contiguous; written.
        tile: what a program computes.
        adds: add to what is there.
    """
    _launch(x, weight, bias, out, tile, adds=adds, gate=Gate.NONE)


def multiply_gated(x: Tensor, weight: Tensor, out: Tensor, tile: StepTile, gate: Gate) -> None:
    """The first two of a gated MLP's three products, and its activation.

    Args:
        x: (..., K), contiguous; at least one row.
        weight: (2 * N, K), contiguous, rows of the gate before the others; K a multiple of 8.
        out: (..., N), contiguous; written.
        tile: what a program computes, of the gate and of the others.
        gate: the activation.
    """
    _launch(x, weight, None, out, tile, adds=False, gate=gate)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: StepTile, *, adds: bool, gate: Gate
) -> None:
    num_columns, depth = out.shape[-1], x.shape[-1]
    rows = x.view(-1, depth)
    num_tiles = triton.cdiv(len(rows), tile.rows) * triton.cdiv(num_columns, tile.columns)
    parts = finished = None
    if tile.splits > 1:
        size = num_tiles * tile.splits * tile.rows * tile.columns
        parts, finished = torch.empty(size, dtype=torch.float32, device=x.device), _counters(x.device)
        assert num_tiles <= len(finished), (num_tiles, tile)
    _step_product[(num_tiles * tile.splits,)](
        TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
        weight,
        bias,
        out,
        parts,
        finished,
        len(rows),
        num_columns,
        depth,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        GATE=int(gate),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK=tile.depth,
        SPLITS=tile.splits,
        AHEAD=_ahead(depth),
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        **OVERLAPPING,
    )


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, in which programs of a tile are counted as they end; whoever counts the last one leaves a zero."""
    return torch.zeros(_MAX_PROGRAMS, dtype=torch.int32, device=device)


def _ahead(depth: int) -> int:
    """Of each row of the weight so many numbers are asked for while earlier kernels end: whole lines of the cache."""
    return 512 if depth >= 512 else 0


@triton.jit(do_not_specialize=["num_rows"])
def _step_product(
    x,
    weight,
    numbers,
    bias,
    out,
    parts,
    finished,
    num_rows,
    num_columns,
    depth,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A part of a tile; tiles of the same columns run beside each other, and share what they read of the weight."""
    tiles_down = tl.cdiv(num_rows, ROWS)
    split, tile = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    down, across = tile % tiles_down, tile // tiles_down
    steps = tl.cdiv(tl.cdiv(depth, BLOCK), SPLITS)
    first = split * steps
    if OVERLAPS and AHEAD:
        columns = tl.minimum(across * COLUMNS + tl.arange(0, COLUMNS), num_columns - 1).to(tl.int64)
        lines = first * BLOCK + tl.arange(0, AHEAD // 64) * 64
        lines = tl.minimum(lines, depth - 1)
        ask_for(numbers + columns[:, None] * depth + lines[None, :])
        if GATE:
            ask_for(numbers + (columns + num_columns)[:, None] * depth + lines[None, :])
    wait_for_earlier(OVERLAPS)
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    others = tl.zeros((COLUMNS, ROWS), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(depth, BLOCK))):
        factors = x.load([down * ROWS, step * BLOCK]).T
        total = tl.dot(weight.load([across * COLUMNS, step * BLOCK]), factors, total)
        if GATE:
            part = weight.load([num_columns + across * COLUMNS, step * BLOCK])
            others = tl.dot(part, factors, others)
    if SPLITS == 1:
        _finish(total, others, bias, out, down, across, num_rows, num_columns, HAS_BIAS, ADDS, GATE, ROWS, COLUMNS)
    else:
        at = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        parts += tile.to(tl.int64) * SPLITS * (COLUMNS * ROWS)
        tl.store(parts + split * (COLUMNS * ROWS) + at, total)
        # All threads have stored before one of them counts; the last program sees what the others stored.
        tl.debug_barrier()
        if tl.atomic_add(finished + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(finished + tile, 0)
            total = tl.zeros((COLUMNS, ROWS), tl.float32)
            for number in range(SPLITS):
                # Not from the L1 cache, which does not see what other multiprocessors have stored.
                total += tl.load(parts + number * (COLUMNS * ROWS) + at, cache_modifier=".cg")
            _finish(total, others, bias, out, down, across, num_rows, num_columns, HAS_BIAS, ADDS, 0, ROWS, COLUMNS)


@triton.jit
def _finish(
    total,
    others,
    bias,
    out,
    down,
    across,
    num_rows,
    num_columns,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    result = total.T
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    places = out + rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if ADDS:
        result += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        # Rounded as if both had been written and read.
        gated = result.to(out.dtype.element_ty).to(tl.float32)
        if GATE == 1:
            gated *= tl.sigmoid(gated)
        else:
            gated *= tl.sigmoid(1.5957691216057308 * (gated + 0.044715 * gated * gated * gated))
        result = gated.to(out.dtype.element_ty) * others.T.to(out.dtype.element_ty)
    tl.store(places, result.to(out.dtype.element_ty), mask=inside)
