"""Attention of decodes over a paged pool on a GPU, in Triton; bfloat16 and float16, keys and values also in FP8."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV, Scores
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_scores import (
    codes_of_tile,
    empty_softmax,
    factors,
    slots_of_tile,
    squash,
    store_mean,
    switches,
    weigh,
)
from deployments.engine.kernels.cuda_splits import MAX_SPLITS, DecodeTile, Splits, merge, merge_if_last

# Of up to 64 sequences, counted for each KV head, there are programs enough only if each is cut into many.
_FEW_SEQUENCES = 64


def decode_tile(head_dim: int, num_sequences: int, *, is_fp8: bool = False) -> DecodeTile:
    """The best of those tried on an H200 (docs/log.md, 2026-11-29).

    Args:
        head_dim: of keys and values.
        num_sequences: times KV heads.
        is_fp8: whether they are codes.
    """
    is_few = num_sequences <= _FEW_SEQUENCES
    if is_fp8:
        if head_dim <= 64:
            return DecodeTile(64, 1, 5, 800, 1056)
        if head_dim <= 128:
            return DecodeTile(64, 2, 3) if is_few else DecodeTile(32, 1, 5, 800, 1056)
        return DecodeTile(16, 1, 5, 800, 1056)
    if head_dim <= 64:
        return DecodeTile(16, 1, 10)
    if head_dim <= 128:
        return DecodeTile(32, 2, 6) if is_few else DecodeTile(16, 1, 6)
    return DecodeTile(32, 4, 3)


def decode_attention(queries: Tensor, kv: PagedKV, tables: Tensor, splits: Splits, scores: Scores) -> Tensor:
    """Attention of one query per sequence over a paged pool.

    Args:
        queries: (D, H, head_dim), contiguous.
        kv: its blocks of a multiple of 64 tokens, in FP8 of 128.
        tables: (D, max_blocks) int32 block ids; only those within the window are read.
        splits: of sequences whose lengths include the new token; those of length 0 are padding and give zeros.
            Planned with the tile of `decode_tile` and the window of `scores`.
        scores: what becomes of them.

    Returns:
        (D, H, head_dim).

    Source: PagedAttention (Kwon et al., SOSP 2023); splits and their merging from Flash-Decoding (Dao et al., 2023).
    """
    num_seqs, num_heads, head_dim = queries.shape
    num_items, num_kv_heads = len(splits.items), kv.keys.shape[2]
    group = num_heads // num_kv_heads
    tile = decode_tile(head_dim, num_seqs * num_kv_heads, is_fp8=kv.key_scales is not None)
    out = torch.empty_like(queries)
    parts = torch.empty((num_items, num_heads, head_dim), dtype=torch.float32, device=queries.device)
    stats = torch.empty((num_items, num_heads, 2), dtype=torch.float32, device=queries.device)
    # All heads of an item run beside each other: they read the same lines of memory.
    _decode_attention[(num_kv_heads, num_items)](
        queries,
        *kv,
        tables,
        splits.items,
        splits.spans,
        splits.finished,
        scores.sinks,
        out,
        parts,
        stats,
        *factors(scores)[:2],
        tables.stride(0),
        num_kv_heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=kv.keys.shape[1],
        TILE=tile.num_tokens,
        WIDTH=splits.items.shape[1],
        SPLITS=MAX_SPLITS,
        # Where most sequences are cut, heads are merged side by side; else by whoever ends last, without a launch.
        MERGES=not splits.is_cut,
        **switches(scores),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OVERLAPPING,
    )
    if splits.is_cut:
        merge(parts, stats, splits.spans, scores.sinks, out)
    return out


@triton.jit
def _decode_attention(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    items,
    spans,
    finished,
    sinks,
    out,
    parts,
    stats,
    scaling,
    softcap,
    table_stride,
    num_kv_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One item of the plan, one KV head with its group of queries. Scores are in powers of two."""
    wait_for_earlier(OVERLAPS)
    kv_head, item = tl.program_id(0), tl.program_id(1)
    row = items + item * WIDTH
    sequence, begin, start, end = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if sequence < 0:
        return
    start, count = tl.multiple_of(start, TILE), tl.load(spans + sequence * 2 + 1)
    g, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    kept = (g < GROUP)[:, None]
    if HEAD_DIM != DIMS:
        kept &= (dims < HEAD_DIM)[None, :]
    head = (sequence.to(tl.int64) * num_kv_heads + kv_head) * GROUP + g
    query = tl.load(queries + head[:, None] * HEAD_DIM + dims[None, :], mask=kept, other=0.0)
    if key_scales is None:
        peak, total, result = _attend(
            query, keys, values, tables + sequence * table_stride, begin, start, end, kv_head, num_kv_heads,
            scaling, softcap, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        peak, total, result = _attend_codes(
            query, keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM, key_scales + kv_head * BLOCK_SIZE,
            value_scales + kv_head * BLOCK_SIZE, tables + sequence * table_stride, begin, start, end,
            num_kv_heads * HEAD_DIM, scaling, softcap, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
    _store(
        peak, total, result, kept, head, parts, stats, spans, finished, sinks, out, sequence, kv_head, item, count,
        num_kv_heads, GROUP, ROWS, HEAD_DIM, DIMS, SPLITS, MERGES, HAS_SINKS,
    )  # fmt: skip


@triton.jit
def _store(
    peak,
    total,
    result,
    kept,
    head,
    parts,
    stats,
    spans,
    finished,
    sinks,
    out,
    sequence,
    kv_head,
    item,
    count,
    num_kv_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The result of an item: the output, where it is all of its sequence, else a part of it to be merged."""
    g, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    if count == 1:
        target = out + head[:, None] * HEAD_DIM + dims[None, :]
        store_mean(target, kept, sinks, kv_head * GROUP + g % GROUP, peak, total, result, HAS_SINKS)
    else:
        place = (item.to(tl.int64) * num_kv_heads + kv_head) * GROUP + g
        tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], result, mask=kept)
        tl.store(stats + place * 2, peak, mask=g < GROUP)
        tl.store(stats + place * 2 + 1, total, mask=g < GROUP)
        if MERGES:
            merge_if_last(
                parts, stats, spans, finished, sinks, out, sequence, kv_head, count, num_kv_heads,
                GROUP, HEAD_DIM, DIMS, SPLITS, HAS_SINKS,
            )  # fmt: skip


@triton.jit
def _attend(
    query,
    keys,
    values,
    table,
    begin,
    start,
    end,
    kv_head,
    num_kv_heads,
    scaling,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Tiles from `start` to `end`, but for keys before `begin`: peak and total of the scores, and the weighted sum."""
    dims, tokens = tl.arange(0, DIMS), tl.arange(0, TILE)
    peak, total, result = empty_softmax(query.shape[0], DIMS)
    for first in range(start, end, TILE):
        slots = slots_of_tile(table, first, tokens, BLOCK_SIZE)
        at = (slots[:, None] * num_kv_heads + kv_head) * HEAD_DIM + dims[None, :]
        inside = first + tokens < end
        if HAS_WINDOW:
            inside &= first + tokens >= begin
        loaded = inside[:, None]
        if HEAD_DIM != DIMS:
            loaded &= (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + at, mask=loaded, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scaling
        if HAS_SOFTCAP:
            scores = squash(scores, softcap)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        peak, total, weights, shrink = weigh(scores, peak, total, MAY_SEE_NOTHING=False)
        value = tl.load(values + at, mask=loaded, other=0.0)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None])
    return peak, total, result


@triton.jit
def _attend_codes(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    begin,
    start,
    end,
    token_stride,
    scaling,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """As `_attend`, of codes, which become float16: it holds all of them, and a GPU has instructions for that alone.

    Queries and weights become float16 as well, brought near 1 by powers of 2 before; scales follow after the products.
    """
    largest = tl.maximum(tl.max(tl.abs(query.to(tl.float32)), axis=1), 7.888609052210118e-31)
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    query = (query.to(tl.float32) / unit[:, None]).to(tl.float16)
    unit *= scaling
    dims, tokens = tl.arange(0, DIMS), tl.arange(0, TILE)
    peak, total, result = empty_softmax(query.shape[0], DIMS)
    for first in range(start, end, TILE):
        code, scale = codes_of_tile(table, first, tokens, token_stride, HEAD_DIM, BLOCK_SIZE)
        at = code[:, None] + dims[None, :]
        inside = first + tokens < end
        if HAS_WINDOW:
            inside &= first + tokens >= begin
        loaded = inside[:, None]
        if HEAD_DIM != DIMS:
            loaded &= (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + at, mask=loaded, other=0.0)
        of_key = tl.load(key_scales + scale, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key.to(tl.float16))) * (unit[:, None] * of_key[None, :])
        if HAS_SOFTCAP:
            scores = squash(scores, softcap)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        peak, total, weights, shrink = weigh(scores, peak, total, MAY_SEE_NOTHING=False)
        value = tl.load(values + at, mask=loaded, other=0.0)
        of_value = tl.load(value_scales + scale, mask=inside, other=0.0)
        highest = tl.maximum(tl.max(of_value, axis=0), 7.888609052210118e-31)
        weights = (weights * (of_value / highest)[None, :]).to(tl.float16)
        result = result * shrink[:, None] + tl.dot(weights, value.to(tl.float16)) * highest
    return peak, total, result
