"""The two halves of a decoder layer around its attention, each as one call; float32 on a CPU.

What a layer does beside products and attention is little arithmetic. As operators and modules it took Python half a
millisecond, which finds its code swept from the caches by the weights: 15 to 20 of 44 ms of a decode step
(SmolLM2-135M, 30 layers, two Sapphire Rapids cores with AVX2 alone, 2026-11).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import numpy as np
from numba import njit, prange

from deployments.engine.kernels.cpu import PARALLEL, normalise_row, rotate_head, silu_mul_row
from deployments.engine.kernels.cpu_matmul import multiply_packed

_FLOAT = np.float32


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def enter_attention(
    hidden, norm, eps, panels, bias, query_norm, key_norm, head_eps, cos, sin, slots, queries, keys, values
):
    """From a layer's input to its queries, and to keys and values in the pool.

    Args:
        hidden: (T, N).
        norm: (N,) weight of the RMSNorm before.
        eps: of that norm.
        panels: packed weight of queries, keys and values, in this order.
        bias: packed likewise.
        query_norm: (head_dim,) weight of the RMSNorm of a head's queries; (0,): there is none.
        key_norm: the keys' likewise.
        head_eps: of these norms.
        cos: (T, head_dim).
        sin: as cos.
        slots: (T,) int64 places in the pool.
        queries: (T, H, head_dim), filled.
        keys: (num_blocks, block_size, H_kv, head_dim) of the layer, contiguous; written to.
        values: as the keys.
    """
    num_tokens, num_heads, head_dim = queries.shape
    block_size, num_kv_heads = keys.shape[1], keys.shape[2]
    num_kinds = num_heads + 2 * num_kv_heads
    normed = np.empty(hidden.shape, _FLOAT)
    for t in prange(num_tokens):
        normalise_row(hidden[t], norm, eps, normed[t])
    merged = np.empty((num_tokens, num_kinds * head_dim), _FLOAT)
    multiply_packed(normed, panels, bias, merged)
    for t in prange(num_tokens):
        heads = merged[t].reshape(num_kinds, head_dim)
        block, offset = slots[t] // block_size, slots[t] % block_size
        for head in range(num_heads):
            _finish_head(heads[head], query_norm, head_eps, cos[t], sin[t], queries[t, head])
        for head in range(num_kv_heads):
            key, value = heads[num_heads + head], heads[num_heads + num_kv_heads + head]
            _finish_head(key, key_norm, head_eps, cos[t], sin[t], keys[block, offset, head])
            _copy_row(value, values[block, offset, head])


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def leave_attention(attended, hidden, panels, bias, norm, eps, width, gate_up, gate_up_bias, down, down_bias):
    """From what attention gives to the layer's output, through a gated MLP.

    Args:
        attended: (T, H * head_dim).
        hidden: (T, N) the layer's input; its output when done.
        panels: packed weight of attention's output projection.
        bias: packed likewise.
        norm: (N,) weight of the RMSNorm before the MLP.
        eps: of that norm.
        width: of the MLP, between its projections.
        gate_up: packed weight of the gate, then of what it scales.
        gate_up_bias: packed likewise.
        down: packed weight of the MLP's last projection.
        down_bias: packed likewise.
    """
    num_tokens = hidden.shape[0]
    added, normed = np.empty(hidden.shape, _FLOAT), np.empty(hidden.shape, _FLOAT)
    multiply_packed(attended, panels, bias, added)
    for t in prange(num_tokens):
        _add_row(hidden[t], added[t])
        normalise_row(hidden[t], norm, eps, normed[t])
    gated, activated = np.empty((num_tokens, 2 * width), _FLOAT), np.empty((num_tokens, width), _FLOAT)
    multiply_packed(normed, gate_up, gate_up_bias, gated)
    for t in prange(num_tokens):
        silu_mul_row(gated[t], activated[t])
    multiply_packed(activated, down, down_bias, added)
    for t in prange(num_tokens):
        _add_row(hidden[t], added[t])


@njit
def _finish_head(head, norm, eps, cos, sin, result):
    """Normalise, if there is a norm, and rotate. The head's memory is used on the way."""
    if norm.shape[0] > 0:
        normalise_row(head, norm, eps, head)
    rotate_head(head, cos, sin, result)


@njit
def _copy_row(row, result):
    """As `result[:] = row`, whose error alone takes 4 s to compile."""
    for j in range(result.shape[0]):
        result[j] = row[j]


@njit
def _add_row(total, row):
    for j in range(row.shape[0]):
        total[j] += row[j]
