"""Matrix product with a weight that lies in the order in which it is read; float32 on a CPU, few rows or many.

A panel of some columns is read once and stays in the second-level cache for all rows, which is what a decode step
needs: it is bound by reading the weights. While some weights are multiplied, the ones behind them are fetched, so that
memory and arithmetic work at the same time.

Each output is one sum, taken in order. So a row's bits do not depend on what else is in the batch, nor on the shapes of
tiles, which differ between CPUs.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from deployments.engine.kernels.cpu import PARALLEL
from deployments.engine.kernels.cpu_tiles import LANES, NUM_REGISTERS, matmul_tile

# Vectors of a panel and rows of a tile: sums in 24 of 32 registers, 12 of 16; 3 more hold weights.
_VECTORS = 3
_ROWS = 8 if NUM_REGISTERS == 32 else 4
_PANEL = _VECTORS * LANES
_PANEL_BYTES = 4 * _PANEL
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
        self.num_columns, depth = weight.shape
        num_panels = -(-self.num_columns // _PANEL)
        full = self.num_columns // _PANEL
        panels = torch.zeros(num_panels, depth, _PANEL)  # torch aligns memory to cache lines
        panels[:full] = weight[: full * _PANEL].view(full, _PANEL, depth).transpose(1, 2)
        if full < num_panels:
            panels[full, :, : self.num_columns - full * _PANEL] = weight[full * _PANEL :].t()
        starts = torch.zeros(num_panels * _PANEL)
        if bias is not None:
            starts[: self.num_columns] = bias
        self.panels, self.bias = panels.numpy(), starts.numpy()


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
def _multiply(x, x_stride, num_rows, panel, depth, end, bias, out, out_stride):
    """Fill a panel's columns in all rows of out; addresses and bytes. The last panel ends at `end`."""
    for begin in range(0, depth, _DEPTH):
        count = min(_DEPTH, depth - begin)
        weight = panel + begin * _PANEL_BYTES
        following = weight + count * _PANEL_BYTES  # what is read next, of this panel or of the one behind it
        fetched = _PANEL_BYTES if following < end else 0
        row = 0
        while row < num_rows:
            left = num_rows - row
            rows = _ROWS if left >= _ROWS else 4 if left >= 4 else 2 if left >= 2 else 1
            share = rows * fetched // num_rows  # all tiles together fetch it once
            ahead = following + row * fetched // num_rows * count
            part, to = x + row * x_stride + 4 * begin, out + row * out_stride
            start, start_stride = (bias, 0) if begin == 0 else (to, out_stride)
            if rows == _ROWS:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, _ROWS, _VECTORS
                )
            elif rows == 4:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, 4, _VECTORS
                )
            elif rows == 2:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, 2, _VECTORS
                )
            else:
                matmul_tile(
                    part, x_stride, weight, count, ahead, share, start, start_stride, to, out_stride, 1, _VECTORS
                )
            row += rows


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def multiply_packed(x, packed, bias, out):
    """`linear`, for compiled code: (T, K), panels and starts of a `PackedWeight`, and (T, N), which is filled."""
    depth, num_columns = x.shape[1], out.shape[1]
    x_at, packed_at = np.int64(x.ctypes.data), np.int64(packed.ctypes.data)
    bias_at, out_at = np.int64(bias.ctypes.data), np.int64(out.ctypes.data)
    end = packed_at + packed.shape[0] * depth * _PANEL_BYTES
    for top in range(0, x.shape[0], _ROWS_AT_ONCE):
        num_rows = min(_ROWS_AT_ONCE, x.shape[0] - top)
        rows, sums = x_at + 4 * top * depth, out_at + 4 * top * num_columns
        for p in prange(packed.shape[0]):
            panel, start, first = packed_at + p * depth * _PANEL_BYTES, bias_at + p * _PANEL_BYTES, p * _PANEL
            if first + _PANEL <= num_columns:
                _multiply(rows, 4 * depth, num_rows, panel, depth, end, start, sums + 4 * first, 4 * num_columns)
            else:
                whole = np.empty((num_rows, _PANEL), np.float32)
                whole_at = np.int64(whole.ctypes.data)
                _multiply(rows, 4 * depth, num_rows, panel, depth, end, start, whole_at, _PANEL_BYTES)
                out[top : top + num_rows, first:] = whole[:, : num_columns - first]
