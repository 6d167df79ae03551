"""Rows of numbers rounded to FP8 on a GPU, in Triton: by themselves, or by the norm or the activation before a product.

Each row has a scale of its own, found when it comes.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda import normalised
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.fp8 import FP8


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows of numbers in FP8.

    Attributes:
        codes: (T, K) float8_e4m3fn, contiguous.
        scales: (T, 1) float32.
        padded: the codes with rows of zeros behind them, up to a power of 2, or to a multiple of 128.
        shape: that the rows had.
        dtype: that the numbers had.
    """

    codes: Tensor
    scales: Tensor
    padded: Tensor
    shape: torch.Size
    dtype: torch.dtype


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Round each row to codes.

    Args:
        x: (..., K), contiguous.
    """
    size = x.shape[-1]
    rows = _empty_rows(x.shape, x.dtype, x.device)
    block = triton.next_power_of_2(size)
    _quantize_rows[(len(rows.padded),)](
        x, rows.padded, rows.scales, len(rows.codes), size, BLOCK=block, num_warps=_num_warps(block), **OVERLAPPING
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
    _rms_norm_quantized[(len(rows.padded),)](
        x,
        weight,
        rows.padded,
        rows.scales,
        eps,
        len(rows.codes),
        size,
        BLOCK=block,
        num_warps=_num_warps(block),
        **OVERLAPPING,
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


def _gated(gate_up: Tensor, is_gelu: bool) -> Fp8Rows:
    size = gate_up.shape[-1] // 2
    rows = _empty_rows(torch.Size((*gate_up.shape[:-1], size)), gate_up.dtype, gate_up.device)
    block = triton.next_power_of_2(size)
    _gated_quantized[(len(rows.padded),)](
        gate_up,
        rows.padded,
        rows.scales,
        len(rows.codes),
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
    # Tiles that reach beyond the rows are read more slowly: products of 80 rows took longer than those of 128.
    num_padded = max(16, triton.next_power_of_2(num_rows)) if num_rows <= 128 else -(-num_rows // 128) * 128
    padded = torch.empty((num_padded, size), dtype=FP8, device=device)
    scales = torch.empty((num_padded, 1), dtype=torch.float32, device=device)
    return Fp8Rows(padded[:num_rows], scales[:num_rows], padded, shape, dtype)


def _num_warps(block: int) -> int:
    return 16 if block >= 16384 else 8 if block >= 4096 else 4 if block >= 1024 else 1


@triton.jit
def _store_codes(value, codes, scales, row, at, size):
    """Round a row of float32; one of zeros has a scale that is not."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=0) / 448.0, 7.888609052210118e-31)
    tl.store(scales + row, scale)
    tl.store(codes + row * size + at, (value / scale).to(codes.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows(x, codes, scales, num_rows, size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = (at < size) & (row < num_rows)
    value = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    _store_codes(value, codes, scales, row, at, size)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_quantized(x, weight, codes, scales, eps, num_rows, size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = (at < size) & (row < num_rows)
    value = tl.load(x + row * size + at, mask=inside, other=0.0)
    normed = normalised(value.to(tl.float32), weight, at, inside, eps, size, value.dtype)
    _store_codes(normed.to(tl.float32), codes, scales, row, at, size)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_quantized(
    gate_up, codes, scales, num_rows, size, IS_GELU: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = (at < size) & (row < num_rows)
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0)
    if IS_GELU:
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = gate * tl.sigmoid(gate)
    _store_codes((activated.to(up.dtype) * up).to(tl.float32), codes, scales, row, at, size)
