"""Kernels that torch lacks on a CPU, for float32. Numba compiles them when first called and keeps them on disk."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

from importlib import import_module

import numba
import numpy as np
import torch
from torch import Tensor

from deployments.engine.compiled import njit, prange
from deployments.engine.kernels.cpu_tiles import rotate_tile, silu_mul_tile
from deployments.engine.kernels.cpu_vectors import FLOAT_BYTES, LANES

_FLOAT = np.float32


def _has_openmp() -> bool:
    """Whether numba finds OpenMP's library. Of its own pools one ends the process when two threads use it at once."""
    try:
        import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


# Without it kernels run on one thread, and are not kept on disk: numba's cache, which nodes may share, does not tell
# the two kinds apart.
PARALLEL = _has_openmp()
if PARALLEL:
    numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]


def start_threads() -> None:
    """Start the threads of kernels. OpenMP's number for this thread, which is torch's, becomes theirs: set it after."""
    if PARALLEL:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def use_torch_threads() -> None:
    """Let kernels called from this thread run on as many threads as torch does."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension and scale.

    Args:
        x: (..., N) float32.
        weight: (N,) float32.
        eps: added to the mean square.

    Returns:
        As x.

    Source: RMSNorm (Zhang and Sennrich, 2019).
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = x.shape[-1]
    _rms_norm(x.reshape(-1, size).numpy(), weight.numpy(), _FLOAT(eps), out.view(-1, size).numpy())
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation: silu(gate) * up.

    Args:
        gate_up: (..., 2 * N) float32, the gate's outputs before the others; contiguous.

    Returns:
        (..., N).

    Source: GLU variants (Shazeer, 2020).
    """
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size))
    _silu_mul(gate_up.view(-1, 2 * size).numpy(), out.view(-1, size).numpy())
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, the halves of a head being the pairs' parts.

    Args:
        x: (1, H, T, head_dim) float32; fastest as a view of rows (T, H * head_dim) that may lie further apart.
        cos: (1, T, head_dim) float32, contiguous.
        sin: as cos.

    Returns:
        (1, H, T, head_dim), a view of (T, H, head_dim).

    Source: RoFormer (Su et al., 2021); the layout is GPT-NeoX's.
    """
    _, num_heads, num_tokens, head_dim = x.shape
    if x.stride(1) != head_dim or x.stride(3) != 1:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty((num_tokens, num_heads, head_dim))
    stride = x.stride(2)
    # Compiled code vectorizes over arrays that it knows to be contiguous: all of the memory that x spans is one.
    flat = x.as_strided(((num_tokens - 1) * stride + num_heads * head_dim,), (1,))
    _rotate(flat.numpy(), stride, cos[0].numpy(), sin[0].numpy(), out.numpy())
    return out.transpose(0, 1).unsqueeze(0)


@njit(fastmath=True, inline="always")
def exp_of_negative(x):
    """exp(x) for x <= 0 as a polynomial (Cephes' expf), since calls of the C library's do not vectorize."""
    x = max(x, _FLOAT(-87.0))
    n = np.floor(x * _FLOAT(1.4426950408889634) + _FLOAT(0.5))
    r = x - n * _FLOAT(0.693359375) - n * _FLOAT(-2.12194440e-4)
    p = _FLOAT(1.9875691500e-4)
    p = p * r + _FLOAT(1.3981999507e-3)
    p = p * r + _FLOAT(8.3334519073e-3)
    p = p * r + _FLOAT(4.1665795894e-2)
    p = p * r + _FLOAT(1.6666665459e-1)
    p = p * r + _FLOAT(5.0000001201e-1)
    p = p * r * r + r + _FLOAT(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=True)
def normalise_row(row, weight, eps, result):
    """RMSNorm of one row."""
    total = _FLOAT(0)
    for j in range(row.shape[0]):
        total += row[j] * row[j]
    scale = _FLOAT(1) / np.sqrt(total / _FLOAT(row.shape[0]) + eps)
    for j in range(row.shape[0]):
        result[j] = weight[j] * (row[j] * scale)


@njit(fastmath=True)
def silu_mul_row(gate_up, result):
    """SwiGLU's activation of one row; contiguous."""
    size = result.shape[0]
    num_vectors = size // LANES
    if num_vectors > 0:
        gate_at = np.int64(gate_up.ctypes.data)
        silu_mul_tile(gate_at, gate_at + FLOAT_BYTES * size, np.int64(result.ctypes.data), num_vectors)
    for j in range(num_vectors * LANES, size):
        gate = gate_up[j]
        small = exp_of_negative(-abs(gate))
        share = _FLOAT(1) if gate >= 0 else small
        result[j] = gate * (share / (_FLOAT(1) + small)) * gate_up[size + j]


@njit(fastmath=True)
def rotate_head(head, cos, sin, result):
    """Rotary embedding of one head of one token; contiguous, not in place."""
    half = head.shape[0] // 2
    num_vectors = half // LANES
    if num_vectors > 0:
        at, to = np.int64(head.ctypes.data), np.int64(result.ctypes.data)
        rotate_tile(at, np.int64(cos.ctypes.data), np.int64(sin.ctypes.data), to, FLOAT_BYTES * half, num_vectors)
    for j in range(num_vectors * LANES, half):
        a, b = head[j], head[half + j]
        result[j] = a * cos[j] - b * sin[j]
        result[half + j] = b * cos[half + j] + a * sin[half + j]


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def _rms_norm(x, weight, eps, out):
    for i in prange(x.shape[0]):
        normalise_row(x[i], weight, eps, out[i])


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def _silu_mul(gate_up, out):
    for i in prange(gate_up.shape[0]):
        silu_mul_row(gate_up[i], out[i])


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def _rotate(flat, stride, cos, sin, out):
    num_heads, head_dim = out.shape[1], out.shape[2]
    for t in prange(out.shape[0]):
        for head in range(num_heads):
            start = t * stride + head * head_dim
            rotate_head(flat[start : start + head_dim], cos[t], sin[t], out[t, head])
