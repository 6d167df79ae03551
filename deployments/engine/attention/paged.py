"""Attention on a CPU, straight from the paged pool, by kernels of our own: torch has none for CPUs.

The new tokens' keys and values are in the pool already. A sequence is cut into splits and portions of one length, so
that its result depends on nothing but itself. Drafts are few, and each is attended to as the single token that it is if
it is right: to the bit the same, and without bringing a whole context into the order that prompts read it in.
"""

import numpy as np
import torch
from torch import Tensor

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kernels.arguments import Scores
from deployments.engine.kernels.cpu_paged import Runs, attend_runs
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
    no_slots, no_tables = np.zeros((cache.num_groups, 0), np.int64), np.zeros((cache.num_groups, 0, 1), np.int64)
    nothing = StepArrays(none, none, none, no_slots, none, none, no_tables, 0, none, none)
    queries = torch.empty(0, cache.group.num_kv_heads, cache.group.head_dim)
    PagedStep(nothing, cache, None).attend(0, queries, 1.0, queries)


class _Singles:
    """The runs of a step, where each token of those with drafts is a run of its own, a single token.

    Attributes:
        lens: (D',) int64 tokens of each single token's sequence, itself included.
        runs: starts and counts, (R',) int64 each.
    """

    def __init__(self, arrays: StepArrays) -> None:
        starts, counts, num_tokens = arrays.starts, arrays.counts, arrays.num_decode_tokens
        first = np.cumsum(counts) - counts
        num_runs = int(np.searchsorted(first, num_tokens))
        self._times = counts.copy()
        self._times[num_runs:] = 1
        inside = np.arange(num_tokens) - np.repeat(first[:num_runs], counts[:num_runs])
        alone = np.repeat(starts[:num_runs], counts[:num_runs]) + inside
        self.lens = alone + 1
        self.runs = np.concatenate((alone, starts[num_runs:])), np.concatenate((np.ones_like(alone), counts[num_runs:]))

    def tables(self, tables: np.ndarray) -> np.ndarray:
        """(R, B) block ids of the step's runs: (R', B) of these."""
        return np.repeat(tables, self._times, axis=0)


class PagedStep:
    """The attention of one step; shared by all layers of a group with the same window.

    Attributes:
        runs: of the step.
        slots: (T,) int64 where the tokens' KV goes.
        pool: the blocks.
        window: as kernels take it.
    """

    def __init__(self, arrays: StepArrays, cache: KVCache, window: int | None, group: int = 0) -> None:
        singles = _Singles(arrays)
        lens = singles.lens
        start = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0)
        num_splits = -(-(lens - start) // _SPLIT_TOKENS)
        first_split = np.concatenate(([0], np.cumsum(num_splits)))
        owner = np.repeat(np.arange(len(lens)), num_splits)
        rank = np.arange(len(owner)) - first_split[owner]
        first = start[owner] + rank * _SPLIT_TOKENS
        splits = np.stack((owner, first, np.minimum(first + _SPLIT_TOKENS, lens[owner])), axis=1)
        # Compiled code is compiled once more for arrays that lie in memory otherwise.
        runs = (*singles.runs, singles.tables(arrays.tables[group]), splits, first_split)
        self.runs = Runs(*map(np.ascontiguousarray, runs))
        self.slots = np.ascontiguousarray(arrays.slots[group])
        self.pool: np.ndarray = cache.blocks.numpy()
        self._place_of = cache.place_of
        self.window = _UNBOUNDED if window is None else window

    def attend(self, layer: int, queries: Tensor, scaling: float, out: Tensor) -> None:
        """Attend in one layer.

        Args:
            layer: index of the layer.
            queries: (T, num_heads, head_dim) float32, contiguous.
            scaling: of the scores.
            out: as queries, filled.
        """
        keys, values = self.pool[self._place_of[layer]]
        attend_runs(queries.numpy(), keys, values, self.runs, self.window, _FLOAT(scaling), out.numpy())
