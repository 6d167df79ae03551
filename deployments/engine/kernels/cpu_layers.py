"""Decoder layers of Llama's kind, as many as follow each other, as one call; float32 on a CPU.

What a layer does beside products and attention is little arithmetic. As operators and modules it took Python half a
millisecond, which finds its code swept from the caches by the weights: 15 to 20 of 44 ms of a decode step
(SmolLM2-135M, 30 layers, two Sapphire Rapids cores with AVX2 alone, 2026-11). With three calls a layer Python still
took 5 ms of a decode step, and 20 of a step of 128 prompt tokens.

numba keeps them with all that they call, other files' too.
"""
# mypy: disable-error-code="attr-defined, no-untyped-def, no-untyped-call, untyped-decorator, call-arg"

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from deployments.engine.compiled import njit, prange
from deployments.engine.kernels.cpu import PARALLEL, normalise_row, rotate_head, silu_mul_row
from deployments.engine.kernels.cpu_matmul import multiply_packed
from deployments.engine.kernels.cpu_paged import attend_runs
from deployments.engine.kernels.cpu_unpack import WIDTH

_FLOAT = np.float32
# Addresses of panels and starts of a `PackedWeight`, and the bytes of a panel.
PRODUCT = np.dtype([("panels", np.int64), ("panel_bytes", np.int64), ("bias", np.int64)])
# What a layer is made of, for `run_layers`. Norms are addresses of their weights; those of single heads may be 0: there
# are none.
LAYER = np.dtype(
    [
        ("place", np.int64),  # in blocks of the pool
        ("num_heads", np.int64),
        ("width", np.int64),  # of the MLP, between its projections
        ("before_attention", np.int64),
        ("before_mlp", np.int64),
        ("query_heads", np.int64),
        ("key_heads", np.int64),
        ("attention_eps", np.float32),
        ("mlp_eps", np.float32),
        ("head_eps", np.float32),
        ("qkv", PRODUCT),
        ("attended", PRODUCT),
        ("gate_up", PRODUCT),
        ("down", PRODUCT),
    ],
    align=True,
)


@intrinsic
def _pointer(_, address):
    def generate(context, builder, _signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit
def _floats(address, size):
    """(size,) floats at an address; none at 0."""
    return carray(_pointer(address), (size if address else 0,), _FLOAT)


@njit
def _product(product, num_columns):
    """Panels and starts of a packed weight with so many columns."""
    num_panels = (num_columns + WIDTH - 1) // WIDTH
    panels = carray(_pointer(product.panels), (num_panels, product.panel_bytes), np.uint8)
    return panels, _floats(product.bias, num_panels * WIDTH)


@njit(cache=PARALLEL, nogil=True)
def run_layers(layers, hidden, cos, sin, slots, pool, runs, window, scaling, rows):
    """Run layers one after the other.

    Args:
        layers: (L,) of `LAYER`; what its addresses point to must stay in memory.
        hidden: (T, N) the first layer's input; the last one's output when done.
        cos: (T, head_dim).
        sin: as cos.
        slots: (T,) int64 places in the pool.
        pool: (layers of a block, 2, num_blocks, block_size, H_kv, head_dim) keys and values; written to.
        runs: of the step, a `Runs`.
        window: see `attend_runs`.
        scaling: of the scores.
        rows: int64 places of the tokens whose output is wanted of the last of these layers.
    """
    num_tokens, size = hidden.shape
    num_kv_heads, head_dim = pool.shape[4], pool.shape[5]
    for i in range(layers.shape[0]):
        layer = layers[i]
        keys, values = pool[layer.place, 0], pool[layer.place, 1]
        queries = np.empty((num_tokens, layer.num_heads, head_dim), _FLOAT)
        panels, bias = _product(layer.qkv, (layer.num_heads + 2 * num_kv_heads) * head_dim)
        norm = _floats(layer.before_attention, size)
        query_norm, key_norm = _floats(layer.query_heads, head_dim), _floats(layer.key_heads, head_dim)
        enter_attention(
            hidden,
            norm,
            layer.attention_eps,
            panels,
            bias,
            query_norm,
            key_norm,
            layer.head_eps,
            cos,
            sin,
            slots,
            queries,
            keys,
            values,
        )
        out = np.empty(queries.shape, _FLOAT)
        attend_runs(queries, keys, values, runs, window, scaling, out)
        attended = out.reshape(num_tokens, layer.num_heads * head_dim)
        if i < layers.shape[0] - 1 or rows.shape[0] == num_tokens:
            _leave(layer, attended, hidden)
        elif rows.shape[0] > 0:
            wanted = hidden[rows]
            _leave(layer, attended[rows], wanted)
            for r in range(rows.shape[0]):
                hidden[rows[r]] = wanted[r]


@njit(nogil=True)
def _leave(layer, attended, hidden):
    size = hidden.shape[1]
    panels, bias = _product(layer.attended, size)
    gate_up, gate_up_bias = _product(layer.gate_up, 2 * layer.width)
    down, down_bias = _product(layer.down, size)
    norm = _floats(layer.before_mlp, size)
    leave_attention(
        attended, hidden, panels, bias, norm, layer.mlp_eps, layer.width, gate_up, gate_up_bias, down, down_bias
    )


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
