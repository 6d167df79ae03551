"""Decode attention on a CPU, straight from the paged pool: nothing gathered, masked or padded.

torch has no such kernel for CPUs; numba compiles it at the first call and keeps it on disk. A sequence is cut into
splits of one length, which threads share, so that its result depends on nothing but itself.

Source: PagedAttention (Kwon et al., SOSP 2023); splits and their merging from Flash-Decoding (Dao et al., 2023).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from deployments.engine.batch import Batch
from deployments.engine.kernels.cpu import PARALLEL, exp_of_negative
from deployments.engine.kv_cache import KVCache

_SPLIT_TOKENS = 256
_FLOAT = np.float32


def can_decode(cache: KVCache) -> bool:
    """Whether the kernel exists for this pool: float32 on a CPU."""
    return cache.blocks.device.type == "cpu" and cache.blocks.dtype is torch.float32


def compile_decode(cache: KVCache) -> None:
    """Compile the kernel for this pool, or fetch it from numba's cache, before the first request needs it."""
    shape = cache.shape
    none = torch.empty(0, dtype=torch.int64)
    nothing = Batch(none, none, none, none, np.zeros((0, 1), np.int64), np.zeros(0, np.int64), ())
    PagedDecode(nothing, cache, None).attend(0, torch.empty(0, shape.num_kv_heads, shape.head_dim), 1.0)


class PagedDecode:
    """The decodes of one step; shared by all layers with the same window."""

    def __init__(self, batch: Batch, cache: KVCache, window: int | None) -> None:
        lens = batch.decode_lens
        start = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0)
        num_splits = -(-(lens - start) // _SPLIT_TOKENS)
        self._first_split = np.concatenate(([0], np.cumsum(num_splits)))
        owner = np.repeat(np.arange(len(lens)), num_splits)
        rank = np.arange(len(owner)) - self._first_split[owner]
        first = start[owner] + rank * _SPLIT_TOKENS
        self._splits = np.stack((owner, first, np.minimum(first + _SPLIT_TOKENS, lens[owner])), axis=1)
        self._tables = batch.decode_block_tables
        self._cache = cache

    def attend(self, layer: int, queries: Tensor, scaling: float) -> Tensor:
        """Attention of one query per decode.

        Args:
            layer: index of the layer; the new tokens' KV is already in the pool.
            queries: (D, num_heads, head_dim) float32.
            scaling: of the scores.

        Returns:
            (D, num_heads, head_dim) float32.
        """
        queries = queries.contiguous()
        out = torch.empty_like(queries)
        keys, values = self._cache.blocks[layer].numpy()
        num_splits, num_heads = len(self._splits), queries.shape[1]
        parts = np.empty((num_splits, *queries.shape[1:]), _FLOAT)
        peaks, sums = np.empty((2, num_splits, num_heads), _FLOAT)
        where = (self._tables, self._splits, self._first_split)
        _decode(queries.numpy(), keys, values, *where, _FLOAT(scaling), parts, peaks, sums, out.numpy())
        return out


@njit(fastmath=True, inline="never")
def _scores(query, keys, scores, scaling):
    group = query.shape[0] // keys.shape[1]
    for i in range(keys.shape[0]):
        for kv_head in range(keys.shape[1]):
            key = keys[i, kv_head]
            for g in range(group):
                row = query[kv_head * group + g]
                dot = _FLOAT(0)
                for j in range(key.shape[0]):
                    dot += row[j] * key[j]
                scores[kv_head * group + g, i] = dot * scaling


@njit(fastmath=True, inline="never")
def _softmax(scores, peaks, sums):
    for head in range(scores.shape[0]):
        row = scores[head]
        peak = row[0]  # not -inf, of which fastmath may assume that there is none
        for i in range(1, row.shape[0]):
            peak = max(peak, row[i])
        total = _FLOAT(0)
        for i in range(row.shape[0]):
            weight = exp_of_negative(row[i] - peak)
            row[i] = weight
            total += weight
        peaks[head] = peak
        sums[head] = total


@njit(fastmath=True, inline="never")
def _accumulate(out, values, scores):
    group = out.shape[0] // values.shape[1]
    for kv_head in range(values.shape[1]):
        for g in range(group):
            row, weights = out[kv_head * group + g], scores[kv_head * group + g]
            for i in range(values.shape[0]):
                weight, value = weights[i], values[i, kv_head]
                for j in range(value.shape[0]):
                    row[j] += weight * value[j]


@njit(fastmath=True, inline="never")
def _attend_split(query, keys, values, table, start, end, scaling, out, peaks, sums):
    size = keys.shape[1]
    scores = np.empty((query.shape[0], end - start), _FLOAT)
    for block in range(start // size, (end - 1) // size + 1):
        first, last = max(block * size, start), min((block + 1) * size, end)
        part = keys[table[block], first - block * size : last - block * size]
        _scores(query, part, scores[:, first - start : last - start], scaling)
    _softmax(scores, peaks, sums)
    out[:] = _FLOAT(0)
    for block in range(start // size, (end - 1) // size + 1):
        first, last = max(block * size, start), min((block + 1) * size, end)
        part = values[table[block], first - block * size : last - block * size]
        _accumulate(out, part, scores[:, first - start : last - start])
    for head in range(query.shape[0]):
        row, scale = out[head], _FLOAT(1) / sums[head]
        for j in range(row.shape[0]):
            row[j] *= scale


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


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def _decode(queries, keys, values, tables, splits, first_split, scaling, parts, peaks, sums, out):
    """Fills out. A decode's only split goes there directly; several go to parts and are merged."""
    for s in prange(splits.shape[0]):
        d, start, end = splits[s]
        target = out[d] if first_split[d + 1] - first_split[d] == 1 else parts[s]
        _attend_split(queries[d], keys, values, tables[d], start, end, scaling, target, peaks[s], sums[s])
    if splits.shape[0] > queries.shape[0]:
        for d in range(queries.shape[0]):
            first, last = first_split[d], first_split[d + 1]
            if last - first > 1:
                _merge(parts[first:last], peaks[first:last], sums[first:last], out[d])
