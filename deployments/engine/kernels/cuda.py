"""Norms and activations on a GPU, in Triton; bfloat16 and float16. Files for `cuda` are imported only where one is.

All kernels may be recorded in a CUDA graph: their grids depend on shapes alone, and lengths are read on the GPU.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension and scale, as transformers' models do.

    Args:
        x: (..., M, N), where the M rows lie at equal distances, and so do the groups of them; two dimensions at least.
        weight: (N,); of x's type it scales what has been rounded, in float32 (Gemma) what is rounded then.
        eps: added to the mean square.

    Returns:
        As x; contiguous, or (1, H, T, N) with the heads of a token beside each other, where x has them so.

    Source: RMSNorm (Zhang and Sennrich, 2019).
    """
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        return rms_norm(x.transpose(1, 2), weight, eps).transpose(1, 2)
    num_rows, size = x.shape[-2:]
    groups = x.reshape(x.numel() // max(1, num_rows * size), num_rows, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    _rms_norm[(len(groups) * num_rows,)](
        groups,
        weight,
        out,
        num_rows,
        *groups.stride()[:2],
        eps,
        size,
        BLOCK=block,
        num_warps=_num_warps(block),
        **OVERLAPPING,
    )
    return out


def add_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, next_weight: Tensor | None = None, next_eps: float = 0.0
) -> Tensor | None:
    """Add the norm of x to the residual, in place, and give the next norm of the sum: what stands between two blocks.

    Args:
        residual: (..., N), contiguous.
        x: as the residual.
        weight: (N,) of the norm of x; see `rms_norm`.
        eps: of the norm of x.
        next_weight: (N,) of the norm of the sum; None: it is not wanted.
        next_eps: of the norm of the sum.

    Returns:
        As x, or None.
    """
    size = x.shape[-1]
    out = None if next_weight is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _add_norm[(x.numel() // size,)](
        residual,
        x,
        weight,
        next_weight,
        out,
        eps,
        next_eps,
        size,
        BLOCK=block,
        num_warps=_num_warps(block),
        **OVERLAPPING,
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
    return _gated(gate_up, is_gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """GeGLU's activation: gelu(gate) * up, with the approximation by a hyperbolic tangent; see `silu_mul`."""
    return _gated(gate_up, is_gelu=True)


def _gated(gate_up: Tensor, is_gelu: bool) -> Tensor:
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    num_rows, block = out.numel() // size, min(1024, triton.next_power_of_2(size))
    _gated_mul[(num_rows, triton.cdiv(size, block))](
        gate_up, out, size, IS_GELU=is_gelu, BLOCK=block, num_warps=4, **OVERLAPPING
    )
    return out


def _num_warps(block: int) -> int:
    return 8 if block >= 4096 else 4 if block >= 1024 else 1


@triton.jit
def normalised(value, weight, at, inside, eps, size, dtype: tl.constexpr):
    """A row of float32, normalised, scaled and rounded."""
    scaled = value * tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0)
    return (scaled * factor).to(dtype) if weight.dtype.element_ty == tl.float32 else scaled.to(dtype) * factor


@triton.jit(do_not_specialize=["num_rows"])  # or steps of other sizes would compile their own
def _rms_norm(
    x, weight, out, num_rows, group_stride, row_stride, eps, size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    x += row // num_rows * group_stride + row % num_rows * row_stride
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    normed = normalised(value, weight, at, inside, eps, size, out.dtype.element_ty)
    tl.store(out + row * size + at, normed, mask=inside)


@triton.jit
def _add_norm(residual, x, weight, next_weight, out, eps, next_eps, size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + row + at, mask=inside, other=0.0)
    normed = normalised(value, weight, at, inside, eps, size, before.dtype)
    total = before + normed
    tl.store(residual + row + at, total, mask=inside)
    if next_weight is not None:
        normed = normalised(total.to(tl.float32), next_weight, at, inside, next_eps, size, before.dtype)
        tl.store(out + row + at, normed, mask=inside)


@triton.jit
def _gated_mul(gate_up, out, size, IS_GELU: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_earlier(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside, other=0.0)
    if IS_GELU:
        # gelu(x) = x * (1 + tanh(y)) / 2 = x * sigmoid(2 y), y = sqrt(2 / pi) * (x + 0.044715 x^3)
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = gate * tl.sigmoid(gate)
    tl.store(out + row * size + at, activated.to(up.dtype) * up, mask=inside)
