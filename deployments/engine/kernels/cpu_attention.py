"""Attention of one query per sequence over a paged pool; float32 on a CPU. Nothing is gathered, masked or padded.

Sequences come cut into splits of one length, which threads share. Memory is read in one stream, and the next block is
asked for while this one is computed: blocks lie anywhere, and without that they arrive at a third of the speed
(8 sequences of 350 tokens, 30 layers of 3 KV heads of 64, one thread of a Zen 4 core, 2026-11: 11 ms instead of 22).

Source: PagedAttention (Kwon et al., SOSP 2023); splits and their merging from Flash-Decoding (Dao et al., 2023).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

from typing import Any

import numpy as np

from deployments.engine.compiled import njit, prange
from deployments.engine.kernels.cpu import PARALLEL, exp_of_negative
from deployments.engine.kernels.cpu_tiles import add_weighted_tile, dot_tile, peak_tile, weigh_tile
from deployments.engine.kernels.cpu_vectors import LANES

_FLOAT = np.float32
_VECTOR_BYTES = 4 * LANES
_HEADS = 4  # of a tile at most; of its keys, or vectors of a value, as many as leave its sums in registers
_KEYS = _VECTORS = 4 if LANES == 16 else 2


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def decode_attention(queries, keys, values, tables, splits, first_split, scaling, parts, peaks, sums, out):
    """Attend.

    Args:
        queries: (D, H, head_dim).
        keys: (num_blocks, block_size, H_kv, head_dim), contiguous.
        values: as the keys.
        tables: (D, max_blocks) int64 block ids.
        splits: (S, 3) int64: single token, first token and end of each split, in that order; none is empty.
        first_split: (D + 1,) int64, where each decode's splits begin.
        scaling: of the scores.
        parts: (S, H, head_dim) scratch.
        peaks: (S, H) scratch.
        sums: (S, H) scratch.
        out: (D, H, head_dim), filled.
    """
    for s in prange(splits.shape[0]):
        d, start, end = splits[s]
        target = out[d] if first_split[d + 1] - first_split[d] == 1 else parts[s]  # an only split needs no merging
        _attend_split(queries[d], keys, values, tables[d], start, end, scaling, target, peaks[s], sums[s])
    if splits.shape[0] > queries.shape[0]:
        for d in range(queries.shape[0]):
            first, last = first_split[d], first_split[d + 1]
            if last - first > 1:
                _merge(parts[first:last], peaks[first:last], sums[first:last], out[d])


@njit(fastmath=True, inline="never")
def _attend_split(query, keys, values, table, start, end, scaling, out, peaks, sums):
    size, last_block = keys.shape[1], (end - 1) // keys.shape[1]
    block_bytes = 4 * size * keys.shape[2] * keys.shape[3]
    to_values = np.int64(values.ctypes.data) - np.int64(keys.ctypes.data)
    scores = np.empty((query.shape[0], end - start), _FLOAT)
    scaled = query * scaling
    for block in range(start // size, last_block + 1):
        first, last = max(block * size, start), min((block + 1) * size, end)
        part = keys[table[block], first - block * size : last - block * size]
        if block < last_block:
            ahead = (table[block + 1] - table[block]) * block_bytes
        else:
            ahead = (table[start // size] - table[block]) * block_bytes + to_values
        _score(scaled, part, scores[:, first - start : last - start], ahead)
    _softmax(scores, peaks, sums)
    out[:] = _FLOAT(0)
    for block in range(start // size, last_block + 1):
        first, last = max(block * size, start), min((block + 1) * size, end)
        part = values[table[block], first - block * size : last - block * size]
        ahead = (table[min(block + 1, last_block)] - table[block]) * block_bytes
        _accumulate(out, part, scores[:, first - start : last - start], ahead)
    for head in range(query.shape[0]):
        row, scale = out[head], _FLOAT(1) / sums[head]
        for j in range(row.shape[0]):
            row[j] *= scale


@njit(fastmath=True, inline="never")
def _score(queries, keys, scores, ahead):
    """Fill scores (H, T), a part of longer rows, for queries (H, D) and keys (T, H_kv, D); `ahead`: see `dot_tile`."""
    num_keys, num_kv_heads, head_dim = keys.shape
    group, head_bytes = queries.shape[0] // num_kv_heads, 4 * head_dim
    key_stride, score_stride = num_kv_heads * head_bytes, scores.strides[0]
    whole = head_dim - head_dim % LANES
    # All heads of a few tokens before the next tokens, since that is the order in memory.
    for first in range(0, num_keys if whole else 0, _KEYS):
        count = min(_KEYS, num_keys - first)
        for head in range(queries.shape[0]):
            g = head % group
            if g % _HEADS == 0:
                query = np.int64(queries.ctypes.data) + head * head_bytes
                key = np.int64(keys.ctypes.data) + first * key_stride + head // group * head_bytes
                to = np.int64(scores.ctypes.data) + head * score_stride + 4 * first
                heads = min(_HEADS, group - g)
                _dots(heads, query, head_bytes, key, key_stride, count, ahead, to, score_stride)
    if whole < head_dim:
        for head in range(queries.shape[0]):
            for i in range(num_keys):
                dot = scores[head, i] if whole else _FLOAT(0)
                for j in range(whole, head_dim):
                    dot += queries[head, j] * keys[i, head // group, j]
                scores[head, i] = dot


@njit(fastmath=True, inline="never")
def _softmax(scores, peaks, sums):
    for head in range(scores.shape[0]):
        row = scores[head]
        at, num_vectors = np.int64(row.ctypes.data), row.shape[0] // LANES
        peak_at, sum_at = np.int64(peaks[head:].ctypes.data), np.int64(sums[head:].ctypes.data)
        whole = num_vectors * LANES
        peaks[head] = row[0]  # not -inf, of which fastmath may assume that there is none
        sums[head] = _FLOAT(0)
        if num_vectors:
            peak_tile(at, 0, num_vectors, peak_at, 1)
        for i in range(whole, row.shape[0]):
            peaks[head] = max(peaks[head], row[i])
        if num_vectors:
            weigh_tile(at, 0, num_vectors, peak_at, sum_at, 1)
        for i in range(whole, row.shape[0]):
            weight = exp_of_negative(row[i] - peaks[head])
            row[i] = weight
            sums[head] += weight


@njit(fastmath=True, inline="never")
def _accumulate(out, values, weights, ahead):
    """Add values (T, H_kv, D), weighted by (H, T), a part of longer rows, to out (H, D); `ahead`: see `dot_tile`."""
    num_values, num_kv_heads, head_dim = values.shape
    group, head_bytes = out.shape[0] // num_kv_heads, 4 * head_dim
    value_stride, weight_stride = num_kv_heads * head_bytes, weights.strides[0]
    whole = head_dim - head_dim % LANES
    for first in range(0, num_values if whole else 0, _KEYS):
        count = min(_KEYS, num_values - first)
        for head in range(out.shape[0]):
            g = head % group
            if g % _HEADS == 0:
                weight = np.int64(weights.ctypes.data) + head * weight_stride + 4 * first
                value = np.int64(values.ctypes.data) + first * value_stride + head // group * head_bytes
                to = np.int64(out.ctypes.data) + head * head_bytes
                heads = min(_HEADS, group - g)
                _weighted(heads, weight, weight_stride, value, value_stride, count, ahead, to, head_bytes)
    if whole < head_dim:
        for head in range(out.shape[0]):
            for i in range(num_values):
                for j in range(whole, head_dim):
                    out[head, j] += weights[head, i] * values[i, head // group, j]


@njit(fastmath=True, inline="never")
def _merge(parts, peaks, sums, out):
    for head in range(out.shape[0]):
        row = out[head]
        peak = peaks[0, head]
        for s in range(1, parts.shape[0]):
            peak = max(peak, peaks[s, head])
        total = _FLOAT(0)
        for s in range(parts.shape[0]):
            total += sums[s, head] * exp_of_negative(peaks[s, head] - peak)
        row[:] = _FLOAT(0)
        for s in range(parts.shape[0]):
            part, weight = parts[s, head], sums[s, head] * exp_of_negative(peaks[s, head] - peak) / total
            for j in range(row.shape[0]):
                row[j] += weight * part[j]


def _compile_as(name: str, function: Any) -> Any:
    """Compile one of several functions of one `def`, under a name of its own.

    numba makes a symbol of a name and a number, and gives numbers in the order in which a process compiles. Under one
    name, `dots` 1 would be of four heads in the cache of one process and of one head in that of another. An engine that
    loads kernels which both have cached uses the first symbol it meets for both, and answers nonsense.
    """
    function.__name__ = function.__qualname__ = name
    return njit(nogil=True)(function)


def _build_dots(num_heads):
    """Compile `_dots` for a number of heads, a constant there."""

    def dots(queries, head_bytes, keys, key_stride, num_keys, ahead, out, out_stride):
        num_vectors = head_bytes // _VECTOR_BYTES
        if num_keys == _KEYS:
            dot_tile(queries, head_bytes, keys, key_stride, num_vectors, ahead, out, out_stride, num_heads, _KEYS)
            return
        for i in range(num_keys):
            key, to = keys + i * key_stride, out + 4 * i
            dot_tile(queries, head_bytes, key, key_stride, num_vectors, ahead, to, out_stride, num_heads, 1)

    return _compile_as(f"dots_of_{num_heads}", dots)


def _build_weighted(num_heads):
    """Compile `_weighted` for a number of heads, a constant there."""

    def weighted(weights, weight_stride, values, value_stride, num_values, ahead, out, head_bytes):
        at = 0
        while at + _VECTORS * _VECTOR_BYTES <= head_bytes:
            value, to = values + at, out + at
            add_weighted_tile(
                weights, weight_stride, value, value_stride, num_values, ahead, to, head_bytes, num_heads, _VECTORS
            )
            at += _VECTORS * _VECTOR_BYTES
        while at + _VECTOR_BYTES <= head_bytes:
            value, to = values + at, out + at
            add_weighted_tile(
                weights, weight_stride, value, value_stride, num_values, ahead, to, head_bytes, num_heads, 1
            )
            at += _VECTOR_BYTES

    return _compile_as(f"weighted_of_{num_heads}", weighted)


_dots_of_4, _dots_of_3, _dots_of_2, _dots_of_1 = map(_build_dots, (4, 3, 2, 1))
_weighted_of_4, _weighted_of_3, _weighted_of_2, _weighted_of_1 = map(_build_weighted, (4, 3, 2, 1))


@njit(nogil=True)
def _dots(num_heads, queries, head_bytes, keys, key_stride, num_keys, ahead, out, out_stride):
    """Dot products of 1 to 4 heads' queries with up to _KEYS keys, on whole vectors; addresses and bytes."""
    if num_heads == 4:
        _dots_of_4(queries, head_bytes, keys, key_stride, num_keys, ahead, out, out_stride)
    elif num_heads == 3:
        _dots_of_3(queries, head_bytes, keys, key_stride, num_keys, ahead, out, out_stride)
    elif num_heads == 2:
        _dots_of_2(queries, head_bytes, keys, key_stride, num_keys, ahead, out, out_stride)
    else:
        _dots_of_1(queries, head_bytes, keys, key_stride, num_keys, ahead, out, out_stride)


@njit(nogil=True)
def _weighted(num_heads, weights, weight_stride, values, value_stride, num_values, ahead, out, head_bytes):
    """Add weighted sums for 1 to 4 heads, on whole vectors; addresses and bytes."""
    if num_heads == 4:
        _weighted_of_4(weights, weight_stride, values, value_stride, num_values, ahead, out, head_bytes)
    elif num_heads == 3:
        _weighted_of_3(weights, weight_stride, values, value_stride, num_values, ahead, out, head_bytes)
    elif num_heads == 2:
        _weighted_of_2(weights, weight_stride, values, value_stride, num_values, ahead, out, head_bytes)
    else:
        _weighted_of_1(weights, weight_stride, values, value_stride, num_values, ahead, out, head_bytes)
