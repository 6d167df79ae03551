"""Attention on a CPU, straight from the paged pool, by kernels of our own: torch has none for CPUs.

The new tokens' keys and values are in the pool already. A sequence is cut into splits and portions of one length, so
that its result depends on nothing but itself.
"""

import numpy as np
import torch
from torch import Tensor

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kernels.arguments import Scores
from deployments.engine.kernels.cpu_attention import decode_attention
from deployments.engine.kernels.cpu_prompt import prompt_attention
from deployments.engine.kv.cache import KVCache

_SPLIT_TOKENS = 256
_FLOAT = np.float32
_UNBOUNDED = 1 << 60


def has_kernels(cache: KVCache) -> bool:
    """Whether there are kernels for this pool: float32 on a CPU."""
    return cache.blocks.device.type == "cpu" and cache.blocks.dtype is torch.float32


def can_attend(cache: KVCache, scores: Scores) -> bool:
    """Whether the kernels do what a layer asks for."""
    return has_kernels(cache) and scores.softcap is None and scores.sinks is None


def compile_kernels(cache: KVCache) -> None:
    """Compile the kernels for this pool, or fetch them from numba's cache, before the first request needs them."""
    none = np.zeros(0, np.int64)
    nothing = StepArrays(none, none, none, none, none, none, np.zeros((0, 1), np.int64), 0, none, none)
    queries = torch.empty(0, cache.group.num_kv_heads, cache.group.head_dim)
    PagedDecode(nothing, cache, None).attend(0, queries, 1.0, queries)
    attend_prompt(cache, 0, queries, torch.from_numpy(none), 0, Scores(1.0), queries)


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
        self._pool = cache.blocks.numpy()

    def attend(self, layer: int, queries: Tensor, scaling: float, out: Tensor) -> None:
        """Attention of one query per decode.

        Args:
            layer: index of the layer.
            queries: (D, num_heads, head_dim) float32, contiguous.
            scaling: of the scores.
            out: as queries, filled.
        """
        keys, values = self._pool[layer]
        num_splits, num_heads = len(self._splits), queries.shape[1]
        parts = np.empty((num_splits, *queries.shape[1:]), _FLOAT)
        peaks, sums = np.empty((2, num_splits, num_heads), _FLOAT)
        where = (self._tables, self._splits, self._first_split)
        decode_attention(queries.numpy(), keys, values, *where, _FLOAT(scaling), parts, peaks, sums, out.numpy())


def attend_prompt(
    cache: KVCache, layer: int, queries: Tensor, block_ids: Tensor, context_len: int, scores: Scores, out: Tensor
) -> None:
    """Attention of a run of one sequence's tokens.

    Args:
        cache: the pool.
        layer: index of the layer.
        queries: (T, num_heads, head_dim) float32, contiguous.
        block_ids: (B,) int64 of the sequence.
        context_len: tokens before the run.
        scores: what `can_attend` accepts.
        out: as queries, filled.
    """
    keys, values = cache.blocks.numpy()[layer]
    window = _UNBOUNDED if scores.window is None else scores.window
    where = block_ids.numpy(), context_len, window
    prompt_attention(queries.numpy(), keys, values, *where, _FLOAT(scores.scaling), out.numpy())
