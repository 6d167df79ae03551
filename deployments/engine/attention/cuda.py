"""Attention on a GPU, over the paged pool: single tokens by our kernel, prompts by FlashAttention or one of ours.

Whole prompts attend their own keys and values, which are at hand: by FlashAttention 3, where it is installed, else by
torch's variable-length attention (2). Without 3 recorded lengths are cuDNN's, which is nearly as fast, but plans anew
for each length it meets (70 ms, and memory for good). Prompts with computed context read all from the pool; long chunks
have it copied out of there for FlashAttention 3, which knows no blocks. What none of these has (short windows, sinks
and softcaps in part, blocks in FP8) is done by our own kernel.

A pool in FP8 holds rounded keys and values, and prompts attend their own as rounded, too: what a token sees does not
depend on which tokens came in the same step.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from deployments.engine.attention import flash3
from deployments.engine.attention.base import LayerAttention
from deployments.engine.attention.windows import Pieces, WindowPlan, first_key, plan_window
from deployments.engine.kernels.arguments import PagedKV, Scores
from deployments.engine.kernels.cuda_attention import decode_attention, decode_tile
from deployments.engine.kernels.cuda_fp8_kv import rotate_and_round
from deployments.engine.kernels.cuda_prefill import prefill_attention
from deployments.engine.kernels.cuda_rotary import rotate_and_write
from deployments.engine.kernels.cuda_splits import Splits, plan_splits
from deployments.engine.kv.cache import KVCache, KVShape
from deployments.engine.kv.layers import LayerWatch

_CAUSAL = (-1, 0)
_RECORDED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
_MAX_HEAD_DIM = 256
# Queries that are worth copying their context for; a chunk of so many attends alone. With 30,720 tokens of context
# attention over blocks takes 0.2 ms per 100 queries and layer (Llama-3.1-8B, H100); the copy moves 0.25 GB.
LONG_CHUNK = 512
# Windows that are worth being put together from two causal attentions: 8,192 tokens of Mistral-7B with a window of
# 4,096 take 0.72 ms per layer then and 0.91 in our own kernel, with one of 512 0.39 and 0.28 (H100, 2026-11-27).
_LONG_WINDOW = 1024


def unknown_to_cuda(shape: KVShape) -> str | None:
    """What of a model this attention does not know; None: nothing."""
    head_dim = shape.group.head_dim
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"heads of {head_dim} dimensions (multiples of 8 up to {_MAX_HEAD_DIM} have kernels)"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"KV in {shape.dtype}"
    return None


@dataclass(frozen=True, slots=True)
class Prompts:
    """Chunks of prompts that attend together; P of them, their tokens behind each other in the flat batch.

    Attributes:
        start: of their tokens in the flat batch.
        num_tokens: of all of them.
        max_queries: tokens of the longest chunk.
        max_keys: tokens of the longest sequence, context included.
        starts: (P + 1,) int32 where each chunk begins, from 0.
        sequences: (computed before, new) tokens of each.
        lens: (P,) int32 tokens of each sequence, context and chunk; None: whole prompts, without context.
        capacities: (P + 1,) int32 where each sequence's blocks would begin if they lay behind each other; None as well.
        tables: (P, max_blocks) int32 block ids, by the group of layers; None as well.
        is_recorded: into a CUDA graph, a whole prompt alone, or a chunk alone that may have fewer tokens than the batch
            and any context: so `starts`, `lens` and `tables` are filled anew for each replay, and no capacities needed.
    """

    start: int
    num_tokens: int
    max_queries: int
    max_keys: int
    starts: Tensor
    sequences: tuple[tuple[int, int], ...]
    lens: Tensor | None = None
    capacities: Tensor | None = None
    tables: tuple[Tensor, ...] | None = None
    is_recorded: bool = False
    _plans: dict[int, WindowPlan] = field(default_factory=dict)

    def plan(self, window: int) -> WindowPlan:
        """Made once for all layers; what is recorded reads it in every replay."""
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = plan_window(self.sequences, window, self.starts.device)
        return plan


class CudaStep:
    """One step's attention; its tensors may be those of a CUDA graph, filled anew for each replay.

    Args:
        cache: the pool.
        slots: (G, T) where each token's KV goes, by the group of layers; negative: nowhere.
        single_tables: (D, max_blocks) int32 block ids, by the group; the D single tokens come first in the flat batch.
        single_lens: (D,) int32 tokens of each one's sequence, itself included.
        prompts: the chunks behind the single tokens.
        rows: see `AttentionStep`.
        watch: is told of the layers that have written their KV; None: nobody is.
    """

    def __init__(
        self,
        cache: KVCache,
        slots: Tensor,
        single_tables: tuple[Tensor, ...],
        single_lens: Tensor,
        prompts: tuple[Prompts, ...] = (),
        rows: Tensor | None = None,
        watch: LayerWatch | None = None,
    ) -> None:
        self._cache, self._slots, self._watch = cache, slots, watch
        self._tables, self._lens = single_tables, single_lens
        self._prompts = prompts
        self._splits: dict[int | None, Splits] = {}
        self.rows = rows

    def attend(self, asked: LayerAttention) -> Tensor:
        layer, scores, kv = asked.layer, asked.scores, self._cache.paged(asked.layer)
        group = self._cache.group_of[layer]
        keeps = any(prompts.tables is None for prompts in self._prompts)
        rotated, new_keys, new_values = write(asked, kv, self._slots[group], keeps=keeps)
        if self._watch is not None and layer + 1 in self._watch.ends:
            self._watch.reach(layer + 1)
        if not self._prompts:
            return self._attend_singles(group, rotated, kv, scores)
        parts = []
        if num_singles := len(self._lens):
            parts.append(self._attend_singles(group, rotated[:num_singles], kv, scores))
        for prompts in self._prompts:
            span = slice(prompts.start, prompts.start + prompts.num_tokens)
            if prompts.tables is None:
                assert new_keys is not None
                parts.append(_attend_whole(prompts, rotated[span], new_keys[span], new_values[span], scores))
            else:
                parts.append(_attend_context(prompts, rotated[span], self._cache, layer, scores))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_singles(self, group: int, queries: Tensor, kv: PagedKV, scores: Scores) -> Tensor:
        max_tokens = self._tables[group].shape[1] * self._cache.block_size
        scores = without_idle_window(scores, max_tokens)
        splits = self._splits.get(scores.window)
        if splits is None:
            num_kv_heads = kv.keys.shape[2]
            tile = decode_tile(queries.shape[-1], len(self._lens) * num_kv_heads, is_fp8=self._cache.is_fp8)
            splits = plan_splits(self._lens, num_kv_heads, tile, max_tokens, scores.window)
            self._splits[scores.window] = splits
        return decode_attention(queries, kv, self._tables[group], splits, scores)


def write(asked: LayerAttention, kv: PagedKV, slots: Tensor, *, keeps: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rotate what a layer asks to attend, and write its keys and values into the pool.

    Args:
        asked: of the whole batch.
        kv: of the layer.
        slots: (T,) where each token's KV goes; negative: nowhere.
        keeps: there are prompts that attend their own keys and values.

    Returns:
        Rotated queries, (T, H, head_dim), contiguous; with `keeps` keys and values as they are read from now on.
    """
    new = asked.queries.transpose(0, 1), asked.keys.transpose(0, 1), asked.values.transpose(0, 1)
    if kv.key_scales is not None:
        return rotate_and_round(*new, asked.rotation, kv, slots, keep=keeps)
    pools = kv.keys.view(-1, *kv.keys.shape[2:]), kv.values.view(-1, *kv.values.shape[2:])
    rotated, new_keys = rotate_and_write(*new, asked.rotation, *pools, slots, keep_keys=keeps)
    return rotated, new_keys, new[2]


def without_idle_window(scores: Scores, max_tokens: int) -> Scores:
    """Of sequences of so many tokens at most: a window that holds all of them is none."""
    if scores.window is not None and scores.window >= max_tokens:
        return scores._replace(window=None)
    return scores


def _attend_whole(prompts: Prompts, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    starts, longest = prompts.starts, prompts.max_queries
    seen = without_idle_window(scores, prompts.max_keys)
    if _fits_flash3(queries, seen):
        if seen.window is not None:
            return flash3.attend_within(queries, keys, values, prompts.plan(seen.window), seen)
        return flash3.attend(queries, keys, values, Pieces(starts, starts, longest, longest), seen)
    if not _is_plain(seen):
        # Idle windows too, here and below: without them the kernel would be compiled once more.
        return prefill_attention(
            queries, PagedKV(keys, values), starts, longest, scores, is_recorded=prompts.is_recorded
        )
    if prompts.is_recorded:
        query, key, value = (part.unsqueeze(0).transpose(1, 2) for part in (queries, keys, values))
        with sdpa_kernel(_RECORDED, set_priority=True):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scaling, enable_gqa=True)
        return out.transpose(1, 2).squeeze(0)
    return varlen_attn(  # type: ignore[return-value]  # a pair only if asked for
        queries,
        keys.contiguous(),
        values.contiguous(),
        starts,
        starts,
        longest,
        longest,
        scale=scores.scaling,
        window_size=_CAUSAL,
        enable_gqa=True,
    )


def _attend_context(prompts: Prompts, queries: Tensor, cache: KVCache, layer: int, scores: Scores) -> Tensor:
    kv, asked = cache.paged(layer), (prompts.starts, prompts.max_queries, scores)
    seen = without_idle_window(scores, prompts.max_keys)
    assert prompts.tables is not None
    tables = prompts.tables[cache.group_of[layer]]
    if prompts.is_recorded:
        return prefill_attention(
            queries, kv, *asked, lens=prompts.lens, tables=tables, is_padded=True, is_recorded=True
        )
    assert prompts.capacities is not None
    is_alone = len(tables) == 1
    if is_alone and prompts.num_tokens >= LONG_CHUNK and _fits_flash3(queries, seen):
        return _attend_copied_context(prompts, queries, cache, layer, seen)
    if cache.is_fp8 or not _is_plain(seen):
        return prefill_attention(queries, kv, *asked, lens=prompts.lens, tables=tables)
    return varlen_attn(  # type: ignore[return-value]
        queries,
        kv.keys,
        kv.values,
        prompts.starts,
        prompts.capacities,
        prompts.max_queries,
        prompts.max_keys,
        scale=scores.scaling,
        window_size=_CAUSAL,
        enable_gqa=True,
        seqused_k=prompts.lens,
        block_table=tables,
        # Splits of the keys are put together in the wrong places if there are several sequences (torch 2.13; mended in
        # https://github.com/Dao-AILab/flash-attention/pull/2550).
        num_splits=None if is_alone else 1,
    )


def _attend_copied_context(prompts: Prompts, queries: Tensor, cache: KVCache, layer: int, scores: Scores) -> Tensor:
    """A chunk alone; only the blocks that it sees are copied."""
    assert prompts.tables is not None and prompts.capacities is not None
    table = prompts.tables[cache.group_of[layer]][0]
    where = (prompts.starts, prompts.capacities, prompts.max_queries, prompts.max_keys)
    if scores.window is None:
        keys, values = (part.flatten(0, 1) for part in cache.gather(layer, table))
        return flash3.attend(queries, keys, values, Pieces(*where), scores, prompts.lens)
    first = first_key(prompts.sequences[0][0], scores.window)
    block, skipped = divmod(first, cache.block_size)
    keys, values = (part.flatten(0, 1)[skipped:] for part in cache.gather(layer, table[block:]))
    return flash3.attend_within(queries, keys, values, prompts.plan(scores.window), scores)


def _fits_flash3(queries: Tensor, scores: Scores) -> bool:
    if scores.window is not None and scores.window < _LONG_WINDOW:
        return False
    return flash3.can_attend(queries.dtype, queries.shape[-1], scores)


def _is_plain(scores: Scores) -> bool:
    return scores.window is None and scores.softcap is None and scores.sinks is None
