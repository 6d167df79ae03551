"""Attention on a GPU of a step that verifies drafts: decodes alone, of several tokens each, over the paged pool."""

from torch import Tensor

from deployments.engine.attention.base import LayerAttention
from deployments.engine.attention.cuda import without_idle_window, write
from deployments.engine.kernels.cuda_splits import Splits
from deployments.engine.kernels.cuda_verification import Runs, plan_verification, verification_attention
from deployments.engine.kv.cache import KVCache


class VerificationStep:
    """One step's attention; its tensors are those of a CUDA graph, filled anew for each replay.

    Args:
        cache: the pool.
        slots: (G, T) where each token's KV goes, by the group of layers; negative: nowhere.
        tables: (S, max_blocks) int32 block ids, by the group.
        runs: the tokens of the S sequences.
    """

    rows: Tensor | None = None

    def __init__(self, cache: KVCache, slots: Tensor, tables: tuple[Tensor, ...], runs: Runs) -> None:
        self._cache, self._slots, self._tables, self._runs = cache, slots, tables, runs
        self._splits: dict[int | None, Splits] = {}
        self._out: Tensor | None = None

    def attend(self, asked: LayerAttention) -> Tensor:
        kv, group = self._cache.paged(asked.layer), self._cache.group_of[asked.layer]
        queries, _, _ = write(asked, kv, self._slots[group], keeps=False)
        tables = self._tables[group]
        max_tokens = tables.shape[1] * self._cache.block_size
        scores = without_idle_window(asked.scores, max_tokens)
        splits = self._splits.get(scores.window)
        if splits is None:
            splits = plan_verification(self._runs, queries.shape[1], kv, max_tokens, scores.window)
            self._splits[scores.window] = splits
        if self._out is None or self._out.shape != queries.shape:
            # One for all layers: what nobody writes, tokens that are nobody's, stays zero, with one launch a step.
            self._out = queries.new_zeros(queries.shape)
        verification_attention(queries, kv, tables, self._runs, splits, scores, self._out)
        return self._out
