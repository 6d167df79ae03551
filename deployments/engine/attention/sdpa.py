"""Paged attention anywhere: gather blocks, then torch's fused attention on a CPU, many sequences in one call.

In float32 there are kernels of our own (`paged.py`), which gather nothing and serve all layers but those with sinks or
squashed scores. Other single tokens, whose sequences differ in length, are cut into splits of one length, attended
together, and merged by their log-sum-exp, so that one long sequence beside many short ones costs its own tokens and no
padding of the others. A prompt chunk attends its context without a mask and itself causally, and the two are merged
likewise.

Source: Flash-Decoding (Dao et al., 2023) for splits; cascade inference (Ye et al., 2024) for merging states.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.attention.base import LayerAttention
from deployments.engine.attention.paged import PagedStep, can_attend
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kernels.arguments import Scores
from deployments.engine.kernels.cpu import use_torch_threads
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.upload import upload

# A split has a fixed price beside its tokens: about that of 32 tokens (2 Zen 3 cores, 3 KV heads of 64, 2026-11).
_SPLIT_OVERHEAD_TOKENS = 32
# Of scores, masks and copied keys and values that are there at once, and the queries that share a mask.
_MAX_BYTES = 256 << 20
_MAX_PART = 256
_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A run that is no single token.

    Attributes:
        query_start: where the chunk begins in the flat batch.
        num_queries: its tokens.
        context_len: tokens of the sequence that were computed before it.
        block_ids: (G, ceil((context_len + num_queries) / block_size)) int64 physical blocks, by the group of layers.
    """

    query_start: int
    num_queries: int
    context_len: int
    block_ids: Tensor


@dataclass(frozen=True, slots=True)
class _SplitPlan:
    """How the contexts of the single tokens of a step are cut.

    Attributes:
        block_ids: (G, N * blocks_per_split) int64 blocks to gather, by the group of layers.
        mask: (N, 1, 1, split_len) 0 where a token may be seen, else -inf; None if all may.
        owner: (N,) int64 single token that each split belongs to; None if each has one split.
    """

    block_ids: Tensor
    mask: Tensor | None
    owner: Tensor | None


class SdpaStep:
    """One step's attention; plans are made once and shared by all layers with the same window.

    Args:
        cache: the pool.
        arrays: the step.
        logit_rows: places in the batch of the tokens whose logits are wanted; None: of those that draw.
        watch: is told of the layers that have written their KV; None: nobody is.
    """

    def __init__(
        self,
        cache: KVCache,
        arrays: StepArrays,
        logit_rows: np.ndarray | None = None,
        watch: LayerWatch | None = None,
    ) -> None:
        use_torch_threads()
        self.cache, self.watch = cache, watch
        self._slots = upload(arrays.slots, cache.blocks.device)
        # On a CPU alone: layers there leave the other rows in place, those of a GPU drop them.
        rows = arrays.draw_rows if logit_rows is None else logit_rows
        is_dropping = cache.blocks.device.type == "cpu" and len(rows) < arrays.num_tokens
        self.rows = torch.from_numpy(rows) if is_dropping else None
        self._arrays = arrays
        self._chunks = _cut_chunks(arrays, cache.block_size, cache.blocks.device)
        self._split_plans: dict[int | None, _SplitPlan] = {}
        self._paged: dict[tuple[int, int | None], PagedStep] = {}

    def attend(self, asked: LayerAttention) -> Tensor:
        layer, queries, keys, values, scores, rotation = asked
        assert rotation is None, "this attention takes queries and keys that are rotated"
        num_singles = self._arrays.num_singles
        slots = self._slots[self.cache.group_of[layer]]
        stored = self.cache.write(layer, slots, keys.transpose(0, 1), values.transpose(0, 1))
        self.tell(layer + 1)
        if can_attend(self.cache, scores):
            return self.attend_stored(layer, queries.transpose(0, 1), scores)
        keys, values = (part.transpose(0, 1) for part in stored)
        outputs = []
        if num_singles:
            outputs.append(self._attend_singles(layer, queries[:, :num_singles], scores))
        for chunk in self._chunks:
            span = slice(chunk.query_start, chunk.query_start + chunk.num_queries)
            outputs.append(self._prefill(layer, chunk, queries[:, span], keys[:, span], values[:, span], scores))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def tell(self, num_layers: int) -> None:
        """So many leading layers have written their KV."""
        if self.watch is not None and num_layers in self.watch.ends:
            self.watch.reach(num_layers)

    def attend_stored(self, layer: int, queries: Tensor, scores: Scores) -> Tensor:
        """Attend in one layer whose new keys and values are in the pool, rotated.

        Args:
            layer: index of the layer.
            queries: (T, num_heads, head_dim), rotated.
            scores: what `can_attend` accepts.

        Returns:
            (T, num_heads, head_dim), contiguous.
        """
        queries = queries.contiguous()
        out = torch.empty_like(queries)
        self.paged(scores.window, self.cache.group_of[layer]).attend(layer, queries, scores.scaling, out)
        return out

    def paged(self, window: int | None, group: int = 0) -> PagedStep:
        """For kernels that attend straight from the pool, in layers of a group with this window."""
        paged = self._paged.get((group, window))
        if paged is None:
            paged = self._paged[group, window] = PagedStep(self._arrays, self.cache, window, group)
        return paged

    def _attend_singles(self, layer: int, queries: Tensor, scores: Scores) -> Tensor:
        plan = self._split_plans.get(scores.window)
        if plan is None:
            plan = plan_splits(self._arrays, self.cache.block_size, scores.window, queries)
            self._split_plans[scores.window] = plan
        num_heads, num_singles, head_dim = queries.shape
        num_kv_heads = self.cache.group.num_kv_heads
        grouped = queries.transpose(0, 1).reshape(num_singles, num_kv_heads, num_heads // num_kv_heads, head_dim)
        if plan.owner is not None:
            grouped = grouped.index_select(0, plan.owner)
        out, lse = self._attend_splits(layer, plan, grouped, scores)
        if plan.owner is not None:
            out, lse = _merge_splits(out, lse, plan.owner, num_singles)
        out = out.reshape(num_singles, num_heads, head_dim)
        return out if scores.sinks is None else _sink(out, lse.reshape(num_singles, num_heads), scores.sinks)

    def _attend_splits(self, layer: int, plan: _SplitPlan, grouped: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """All splits: (N, num_kv_heads, group, head_dim) and their log-sum-exp; no more at once than is bounded."""
        num_splits, num_kv_heads, group, head_dim = grouped.shape
        block_ids = plan.block_ids[self.cache.group_of[layer]]
        width = len(block_ids) // num_splits
        num_tokens = width * self.cache.block_size
        # Keys and values, and both once more in float32, and the scores.
        bytes_per_split = 4 * num_tokens * num_kv_heads * (4 * head_dim + 2 * group)
        at_once = max(1, _MAX_BYTES // bytes_per_split)
        parts = []
        for first in range(0, num_splits, at_once):
            part = slice(first, first + at_once)
            keys, values = (
                gathered.view(-1, num_tokens, num_kv_heads, head_dim).transpose(1, 2)
                for gathered in self.cache.gather(layer, block_ids[first * width : part.stop * width])
            )
            mask = None if plan.mask is None else plan.mask[part]
            parts.append(_attend(grouped[part], keys, values, scores, mask=mask))
        if len(parts) == 1:
            return parts[0]
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, lse

    def _prefill(
        self, layer: int, chunk: PromptChunk, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores
    ) -> Tensor:
        end = chunk.context_len + chunk.num_queries
        if (scores.window is not None and end > scores.window) or not _is_fused(queries, scores):
            out, lse = self._prefill_by_parts(layer, chunk, queries, scores)
        else:
            grouped = _group(queries, len(keys))
            out, lse = _attend(grouped, _spread(keys), _spread(values), scores, is_causal=True)
            if chunk.context_len:
                past = self._context(layer, chunk, 0, chunk.context_len)
                past_out, past_lse = _attend(grouped, *past, scores)
                weight = torch.sigmoid(past_lse - lse).unsqueeze(-1).to(out.dtype)
                out, lse = torch.lerp(out, past_out, weight), torch.logaddexp(lse, past_lse)
        out = out.flatten(0, 1).transpose(0, 1)
        return out if scores.sinks is None else _sink(out, lse.flatten(0, 1).transpose(0, 1), scores.sinks)

    def _prefill_by_parts(
        self, layer: int, chunk: PromptChunk, queries: Tensor, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """With masks, and some queries at a time, so that neither masks nor scores grow with the prompt's square."""
        end, window = chunk.context_len + chunk.num_queries, scores.window
        start = 0
        if window is not None:
            start = max(0, chunk.context_len - window + 1) // self.cache.block_size * self.cache.block_size
        keys, values = self._context(layer, chunk, start, end)
        grouped = _group(queries, self.cache.group.num_kv_heads)
        longest = end - start if window is None else min(end - start, window + _MAX_PART)
        part_len = max(1, min(_MAX_PART, _MAX_BYTES // (8 * len(queries) * longest)))
        parts = []
        for first in range(chunk.context_len, end, part_len):
            last = min(end, first + part_len)
            since = start if window is None else max(start, first - window + 1)
            positions = torch.arange(since, last, device=queries.device)
            distance = torch.arange(first, last, device=queries.device).unsqueeze(1) - positions
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(distance.shape, dtype=queries.dtype, device=queries.device)
            mask.masked_fill_(hidden, float("-inf"))
            seen = slice(since - start, last - start)
            part = grouped[:, :, first - chunk.context_len : last - chunk.context_len]
            parts.append(_attend(part, keys[:, :, seen], values[:, :, seen], scores, mask=mask))
        out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return out, lse

    def _context(self, layer: int, chunk: PromptChunk, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Tokens [start, end) from the pool, start on a block's border: keys and values as `_spread` gives them."""
        size = self.cache.block_size
        block_ids = chunk.block_ids[self.cache.group_of[layer], start // size : -(-end // size)]
        gathered = self.cache.gather(layer, block_ids)
        keys, values = (part.flatten(0, 1)[: end - start].transpose(0, 1) for part in gathered)
        return _spread(keys), _spread(values)


def _group(queries: Tensor, num_kv_heads: int) -> Tensor:
    """(num_heads, T, head_dim) to (num_kv_heads, group, T, head_dim)."""
    return queries.view(num_kv_heads, -1, *queries.shape[1:])


def _spread(keys: Tensor) -> Tensor:
    """(num_kv_heads, T, head_dim) to (num_kv_heads, 1, T, head_dim); the group dimension is broadcast later."""
    return keys.unsqueeze(1)


def _is_fused(queries: Tensor, scores: Scores) -> bool:
    """Whether torch has a kernel that gives the normaliser and needs no memory for scores."""
    return queries.device.type == "cpu" and scores.softcap is None


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention without window and sinks that also returns its normaliser, so that parts can be merged.

    Args:
        queries: (N, H, Q, head_dim).
        keys: (N, H or 1, K, head_dim).
        values: as the keys.
        scores: scaling and softcap.
        mask: additive, broadcastable to (N, H, Q, K).
        is_causal: query i sees keys up to i; K equals Q. Only where `_is_fused`.

    Returns:
        Output (N, H, Q, head_dim) and log-sum-exp of the scores, (N, H, Q) float32.
    """
    if _is_fused(queries, scores):
        keys, values = (part.expand(-1, queries.shape[1], -1, -1) for part in (keys, values))
        out, lse = _flash_on_cpu(queries, keys, values, 0.0, is_causal, attn_mask=mask, scale=scores.scaling)
        return out, lse
    assert not is_causal, "a mask says what is seen"
    logits = (queries.float() @ keys.float().transpose(-1, -2)) * scores.scaling
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    if mask is not None:
        logits = logits + mask
    lse = torch.logsumexp(logits, dim=-1)
    return ((logits - lse.unsqueeze(-1)).exp() @ values.float()).to(queries.dtype), lse


def _sink(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let the sinks take their share of the softmax: (T, H, head_dim), with the normaliser (T, H) before."""
    return out * torch.sigmoid(lse - sinks.float()).unsqueeze(-1).to(out.dtype)


def _merge_splits(out: Tensor, lse: Tensor, owner: Tensor, num_singles: int) -> tuple[Tensor, Tensor]:
    """Combine the splits of each single token: (N, H, Q, head_dim), (N, H, Q) to the same of num_singles."""
    peak = lse.new_full((num_singles, *lse.shape[1:]), float("-inf"))
    peak.scatter_reduce_(0, owner[:, None, None].expand_as(lse), lse, "amax")
    weight = torch.exp(lse - peak.index_select(0, owner))
    total = torch.zeros_like(peak).index_add_(0, owner, weight)
    merged = torch.zeros((num_singles, *out.shape[1:]), dtype=torch.float32, device=out.device)
    merged.index_add_(0, owner, out.float() * weight.unsqueeze(-1))
    return (merged / total.unsqueeze(-1)).to(out.dtype), peak + total.log()


def _split_blocks(num_blocks: np.ndarray, block_size: int) -> int:
    """Blocks per split that cost the least for these lengths, padding and fixed price together."""
    candidates = np.unique(np.minimum(2 ** np.arange(3, 12), num_blocks.max()))
    splits = -(-num_blocks[None, :] // candidates[:, None])
    cost = splits.sum(axis=1) * (candidates * block_size + _SPLIT_OVERHEAD_TOKENS)
    return int(candidates[cost.argmin()])


def _cut_chunks(arrays: StepArrays, block_size: int, device: torch.device) -> list[PromptChunk]:
    """The runs behind the single tokens."""
    chunks, query_start = [], arrays.num_singles
    for run in range(arrays.num_singles, arrays.num_runs):
        context_len, num_queries = int(arrays.starts[run]), int(arrays.counts[run])
        num_blocks = -(-(context_len + num_queries) // block_size)
        block_ids = upload(arrays.tables[:, run, :num_blocks], device)
        chunks.append(PromptChunk(query_start, num_queries, context_len, block_ids))
        query_start += num_queries
    return chunks


def plan_splits(arrays: StepArrays, block_size: int, window: int | None, queries: Tensor) -> _SplitPlan:
    lens = arrays.single_lens
    first = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0) // block_size
    num_blocks = -(-lens // block_size) - first
    width = _split_blocks(num_blocks, block_size)
    num_splits = -(-num_blocks // width)
    owner = np.repeat(np.arange(len(lens)), num_splits)
    # Place of each split within its owner's: 0, 1, ... for every owner.
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(num_splits) - num_splits, num_splits)
    logical = (first[owner] + rank * width)[:, None] + np.arange(width)
    tables = arrays.single_tables
    physical = tables[:, owner[:, None], np.minimum(logical, tables.shape[2] - 1)]
    positions = (logical[:, :, None] * block_size + np.arange(block_size)).reshape(len(owner), -1)
    visible = positions < lens[owner, None]
    if window is not None:
        visible &= positions >= lens[owner, None] - window
    mask = None
    if not visible.all():
        mask = torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf")))[:, None, None, :]
        mask = mask.to(device=queries.device, dtype=queries.dtype)
    return _SplitPlan(
        block_ids=torch.from_numpy(physical.reshape(len(tables), -1)).to(queries.device),
        mask=mask,
        owner=torch.from_numpy(owner).to(queries.device) if len(owner) > len(lens) else None,
    )
