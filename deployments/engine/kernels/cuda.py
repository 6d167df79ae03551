"""Norms and activations on a GPU, in Triton; bfloat16 and float16. Files for `cuda` are imported only where one is.

All kernels may be recorded in a CUDA graph: their grids depend on shapes alone, and lengths are read on the GPU.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, round, and scale, as transformers' models do.

    Args:
        x: (..., M, N), where the M rows lie at equal distances, and so do the groups of them; two dimensions at least.
        weight: (N,).
        eps: added to the mean square.

    Returns:
        As x, contiguous.

    Source: RMSNorm (Zhang and Sennrich, 2019).
    """
    num_rows, size = x.shape[-2:]
    groups = x.reshape(-1, num_rows, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    num_warps = 8 if block >= 4096 else 4 if block >= 1024 else 1
    _rms_norm[(len(groups) * num_rows,)](
        groups, weight, out, num_rows, *groups.stride()[:2], eps, size, BLOCK=block, num_warps=num_warps
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation: silu(gate) * up.

    Args:
        gate_up: (..., 2 * N), the gate's outputs before the others; contiguous.

    Returns:
        (..., N).

    Source: GLU variants (Shazeer, 2020).
    """
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    num_rows, block = out.numel() // size, min(1024, triton.next_power_of_2(size))
    _silu_mul[(num_rows, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _rms_norm(x, weight, out, num_rows, group_stride, row_stride, eps, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row // num_rows * group_stride + row % num_rows * row_stride
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    rounded = (value * scale).to(out.dtype.element_ty)
    tl.store(out + row * size + at, rounded * tl.load(weight + at, mask=inside), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside)
    tl.store(out + row * size + at, (gate * tl.sigmoid(gate)).to(up.dtype) * up, mask=inside)
