"""Matrix product with a weight that lies in the order in which it is read; float32 on a CPU, few rows or many.

A panel of some columns is read once, for all rows, which is what a decode step needs: it is bound by reading the
weights. They are kept in few bytes (`cpu_unpack.py`); some rows of a panel at a time become floats in the first-level
cache. While these are multiplied, the ones behind them are fetched, so that memory and arithmetic work at the same
time.

Each output is one sum, taken in order. So a row's bits do not depend on what else is in the batch, nor on the shapes of
tiles, which differ between CPUs.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

import numpy as np
import torch
from torch import Tensor

from deployments.engine.compiled import njit, prange
from deployments.engine.kernels.cpu import PARALLEL
from deployments.engine.kernels.cpu_tiles import matmul_tile
from deployments.engine.kernels.cpu_unpack import FLOATS, GROUP, VECTORS, WIDTH, compact, pack, unpack
from deployments.engine.kernels.cpu_vectors import FLOAT_BYTES, NUM_REGISTERS

# Rows of a tile: with the vectors of a panel sums in 24 of 32 registers, 12 of 16; 3 more hold weights.
_ROWS = 8 if NUM_REGISTERS == 32 else 4
_ROW_BYTES = FLOAT_BYTES * WIDTH
# Rows of weights at once, 18 or 36 KiB, so that the first-level cache holds them for all rows of x. 16 to 128 rows took
# as long with 96 rows of weights, and up to a sixth longer with 384 and 768 (one Sapphire Rapids core, 2026-11).
_DEPTH = 192
# Rows that go through all panels together: x and a panel have to share the second-level cache.
_ROWS_AT_ONCE = 128


class PackedWeight:
    """A weight, and a bias, in the order in which `linear` reads them.

    Args:
        weight: (N, K) float32.
        bias: (N,) float32; None: zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.num_columns, self.depth = weight.shape
        self.panels = pack(compact(weight))
        starts = torch.zeros(len(self.panels) * WIDTH)
        if bias is not None:
            starts[: self.num_columns] = bias
        self.bias = starts.numpy()


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply rows with a packed weight and add its bias.

    Args:
        x: (..., K) float32.
        weight: (N, K), packed.

    Returns:
        (..., N), contiguous.
    """
    out = torch.empty((*x.shape[:-1], weight.num_columns), dtype=torch.float32)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    multiply_packed(rows.numpy(), weight.panels, weight.bias, out.view(-1, weight.num_columns).numpy())
    return out


@njit(nogil=True)
def _multiply(x, x_stride, num_rows, panel, form, depth, end, bias, out, out_stride, floats):
    """Fill a panel's columns in all rows of out; addresses and bytes. The last panel ends at `end`.

    `floats` is scratch memory, as an array: numba frees an array when nothing but its address is used any more.
    """
    for begin in range(0, depth, _DEPTH):
        count = min(_DEPTH, depth - begin)
        weight = unpack(panel, form, begin, count, np.int64(floats.ctypes.data))
        following = panel + (begin + count) * form * WIDTH // GROUP  # what is read next, here or in the panel behind
        fetched = form * WIDTH // GROUP if following < end else 0
        row = 0
        while row < num_rows:
            left = num_rows - row
            rows = _ROWS if left >= _ROWS else 4 if left >= 4 else 2 if left >= 2 else 1
            share = rows * fetched // num_rows  # all tiles together fetch it once
            ahead = following + row * fetched // num_rows * count
            part, to = x + row * x_stride + FLOAT_BYTES * begin, out + row * out_stride
            start, start_stride = (bias, 0) if begin == 0 else (to, out_stride)
            if rows == _ROWS:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, _ROWS, VECTORS
                )
            elif rows == 4:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, 4, VECTORS
                )
            elif rows == 2:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, 2, VECTORS
                )
            else:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, 1, VECTORS
                )
            row += rows


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def multiply_packed(x, panels, bias, out):
    """`linear`, for compiled code: (T, K), panels and starts of a `PackedWeight`, and (T, N), which is filled."""
    depth, num_columns = x.shape[1], out.shape[1]
    panel_bytes = panels.shape[1]
    form = panel_bytes * GROUP // (depth * WIDTH)
    x_at, panels_at = np.int64(x.ctypes.data), np.int64(panels.ctypes.data)
    bias_at, out_at = np.int64(bias.ctypes.data), np.int64(out.ctypes.data)
    end = panels_at + panels.shape[0] * panel_bytes
    for top in range(0, x.shape[0], _ROWS_AT_ONCE):
        num_rows = min(_ROWS_AT_ONCE, x.shape[0] - top)
        rows, sums = x_at + FLOAT_BYTES * top * depth, out_at + FLOAT_BYTES * top * num_columns
        for p in prange(panels.shape[0]):
            panel, start, first = panels_at + p * panel_bytes, bias_at + p * _ROW_BYTES, p * WIDTH
            floats = np.empty(_DEPTH * WIDTH if form != FLOATS else 0, np.float32)
            if first + WIDTH <= num_columns:
                to, to_stride, whole = sums + FLOAT_BYTES * first, FLOAT_BYTES * num_columns, floats
            else:
                whole = np.empty(num_rows * WIDTH, np.float32)
                to, to_stride = np.int64(whole.ctypes.data), _ROW_BYTES
            _multiply(rows, FLOAT_BYTES * depth, num_rows, panel, form, depth, end, start, to, to_stride, floats)
            if first + WIDTH > num_columns:
                out[top : top + num_rows, first:] = whole.reshape(num_rows, WIDTH)[:, : num_columns - first]
