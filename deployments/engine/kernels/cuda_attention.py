"""Attention of decodes over a paged pool on a GPU, in Triton; bfloat16 and float16."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.arguments import Scores
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_scores import (
    Tile,
    add_sink,
    empty_softmax,
    factors,
    normalised,
    slots_of_tile,
    squash,
    switches,
    weigh,
)

_MAX_SPLITS = 32
# A decode attention of fewer programs than this leaves multiprocessors idle (H100: 132).
_ENOUGH_PROGRAMS = 264


def decode_tile(head_dim: int) -> Tile:
    """The best of those tried on an H100 (docs/log.md)."""
    if head_dim <= 64:
        return Tile(64, 2, 4)
    return Tile(32, 2, 4) if head_dim <= 128 else Tile(32, 4, 3)


def decode_attention(
    queries: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lens: Tensor, scores: Scores
) -> Tensor:
    """Attention of one query per sequence over a paged pool.

    Args:
        queries: (D, H, head_dim), contiguous.
        keys: (num_blocks, block_size, H_kv, head_dim), contiguous; block_size a multiple of 64.
        values: as the keys.
        tables: (D, max_blocks) int32 block ids; only those within the window are read.
        lens: (D,) int32 tokens, the new one included; sequences of length 0 are padding and give zeros.
        scores: what becomes of them.

    Returns:
        (D, H, head_dim).

    Source: PagedAttention (Kwon et al., SOSP 2023); splits and their merging from Flash-Decoding (Dao et al., 2023).
    """
    num_seqs, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    tile = decode_tile(head_dim)
    max_tokens = tables.shape[1] * keys.shape[1]
    if scores.window is not None and scores.window >= max_tokens:
        scores = scores._replace(window=None)
    if scores.window is not None:
        max_tokens = min(max_tokens, scores.window + tile.num_tokens)
    num_splits = choose_splits(num_seqs * num_kv_heads, max_tokens)
    out = torch.empty_like(queries)
    parts = torch.empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32, device=queries.device)
    stats = torch.empty((num_seqs, num_heads, num_splits, 2), dtype=torch.float32, device=queries.device)
    _decode_attention[(num_seqs, num_kv_heads, num_splits)](
        queries,
        keys,
        values,
        tables,
        lens,
        scores.sinks,
        out,
        parts,
        stats,
        *factors(scores),
        tables.stride(0),
        num_kv_heads,
        num_splits,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=keys.shape[1],
        TILE=tile.num_tokens,
        WHOLE=num_splits == 1,
        **switches(scores),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OVERLAPPING,
    )
    if num_splits > 1:
        _merge(parts, stats, scores.sinks, out)
    return out


def _merge(parts: Tensor, stats: Tensor, sinks: Tensor | None, out: Tensor) -> None:
    num_seqs, num_heads, num_splits, head_dim = parts.shape
    _merge_splits[(num_seqs * num_heads,)](
        parts,
        stats,
        sinks,
        out,
        num_heads,
        num_splits,
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        SPLITS=triton.next_power_of_2(num_splits),
        HAS_SINKS=sinks is not None,
        num_warps=2,
        **OVERLAPPING,
    )


def choose_splits(num_programs: int, max_tokens: int) -> int:
    """Parts that each sequence is cut into, so that enough programs run; fixed by shapes, as a CUDA graph needs it."""
    wanted = -(-_ENOUGH_PROGRAMS // num_programs)
    return max(1, min(wanted, -(-max_tokens // 64), _MAX_SPLITS))


@triton.jit
def _decode_attention(
    queries,
    keys,
    values,
    tables,
    lens,
    sinks,
    out,
    parts,
    stats,
    scaling,
    softcap,
    window,
    table_stride,
    num_kv_heads,
    num_splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One sequence, one KV head with its group of queries, one split. Scores are in powers of two."""
    wait_for_earlier(OVERLAPS)
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + sequence)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    first_tile = begin // TILE
    per_split = tl.cdiv(tl.cdiv(length, TILE) - first_tile, num_splits)
    start = (first_tile + split * per_split) * TILE
    end = tl.minimum(length, start + per_split * TILE)
    g, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    kept = (g < GROUP)[:, None]
    if HEAD_DIM != DIMS:
        kept &= (dims < HEAD_DIM)[None, :]
    head = (sequence.to(tl.int64) * num_kv_heads + kv_head) * GROUP + g
    query = tl.load(queries + head[:, None] * HEAD_DIM + dims[None, :], mask=kept, other=0.0)
    peak, total, result = _attend(
        query, keys, values, tables + sequence * table_stride, begin, start, end, kv_head, num_kv_heads,
        scaling, softcap, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP,
    )  # fmt: skip
    if WHOLE:
        if HAS_SINKS:
            sink = tl.load(sinks + kv_head * GROUP + g, mask=g < GROUP, other=0.0)
            total, result = add_sink(sink, peak, total, result)
        mean = normalised(result, total).to(out.dtype.element_ty)
        tl.store(out + head[:, None] * HEAD_DIM + dims[None, :], mean, mask=kept)
    else:
        place = head * num_splits + split
        tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], result, mask=kept)
        tl.store(stats + place * 2, peak, mask=g < GROUP)
        tl.store(stats + place * 2 + 1, total, mask=g < GROUP)


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
def _merge_splits(
    parts,
    stats,
    sinks,
    out,
    num_heads,
    num_splits,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One head of one sequence."""
    wait_for_earlier(OVERLAPS)
    head = tl.program_id(0).to(tl.int64)
    split, dims = tl.arange(0, SPLITS), tl.arange(0, DIMS)
    inside = split < num_splits
    place = head * num_splits + split
    peaks = tl.load(stats + place * 2, mask=inside, other=float("-inf"))
    totals = tl.load(stats + place * 2 + 1, mask=inside, other=0.0)
    peak = tl.maximum(tl.max(peaks, axis=0), -1e30)  # of padding every peak is -inf, and -inf less itself no number
    share = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head % num_heads).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
        share = tl.exp2(sink - peak)
    weights = tl.exp2(peaks - peak)
    total = tl.sum(weights * totals, axis=0) + share
    loaded = inside[:, None] & (totals > 0)[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(parts + place[:, None] * HEAD_DIM + dims[None, :], mask=loaded, other=0.0)
    merged = tl.sum(part * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * HEAD_DIM + dims, merged.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
