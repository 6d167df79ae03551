"""Decode attention on a CPU, straight from the paged pool, by a kernel of our own: torch has none for CPUs.

A sequence is cut into splits of one length, so that its result depends on nothing but itself.
"""

import numpy as np
import torch
from torch import Tensor

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kernels.cpu_attention import decode_attention
from deployments.engine.kv.cache import KVCache

_SPLIT_TOKENS = 256
_FLOAT = np.float32


def can_decode(cache: KVCache) -> bool:
    """Whether the kernel exists for this pool: float32 on a CPU."""
    return cache.blocks.device.type == "cpu" and cache.blocks.dtype is torch.float32


def compile_decode(cache: KVCache) -> None:
    """Compile the kernel for this pool, or fetch it from numba's cache, before the first request needs it."""
    shape = cache.shape
    none = np.zeros(0, np.int64)
    nothing = StepArrays(none, none, none, none, none, none, np.zeros((0, 1), np.int64), 0, none, none)
    PagedDecode(nothing, cache, None).attend(0, torch.empty(0, shape.num_kv_heads, shape.head_dim), 1.0)


class PagedDecode:
    """The decodes of one step; shared by all layers with the same window."""

    def __init__(self, arrays: StepArrays, cache: KVCache, window: int | None) -> None:
        lens = arrays.decode_lens
        start = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0)
        num_splits = -(-(lens - start) // _SPLIT_TOKENS)
        self._first_split = np.concatenate(([0], np.cumsum(num_splits)))
        owner = np.repeat(np.arange(len(lens)), num_splits)
        rank = np.arange(len(owner)) - self._first_split[owner]
        first = start[owner] + rank * _SPLIT_TOKENS
        self._splits = np.stack((owner, first, np.minimum(first + _SPLIT_TOKENS, lens[owner])), axis=1)
        self._tables = arrays.decode_tables
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
        decode_attention(queries.numpy(), keys, values, *where, _FLOAT(scaling), parts, peaks, sums, out.numpy())
        return out
