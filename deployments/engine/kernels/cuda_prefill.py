"""Attention of prompts on a GPU, in Triton, for what other kernels lack: windows, softcaps, sinks, over blocks or not.

All heads that share keys are attended together, so that few queries fill a tile as well. Few queries behind many keys
are few programs with much to read: the keys of each are cut into parts then. bfloat16 and float16; keys and values in
blocks also in FP8: they become what the queries are before they are multiplied.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV, Scores
from deployments.engine.kernels.cuda_scores import (
    Tile,
    codes_of_tile,
    empty_softmax,
    factors,
    slots_of_tile,
    squash,
    store_mean,
    switches,
    unseen_out,
    weigh,
)
from deployments.engine.kernels.cuda_splits import MAX_SPLITS, merge_queries

# Two for each multiprocessor of an H100 or H200. More are not worth putting together what they find.
_MAX_PROGRAMS = 264


def prefill_tile(head_dim: int) -> tuple[int, Tile]:
    """Rows of a program, and how it walks along the keys: the best of those tried on an H100 (docs/log.md)."""
    return (64, Tile(64, 4, 3)) if head_dim <= 128 else (128, Tile(64, 8, 2))


def _fitting_tile(head_dim: int, max_rows: int) -> tuple[int, Tile]:
    """As `prefill_tile`, but for no more rows than there are."""
    most_rows, tile = prefill_tile(head_dim)
    rows = min(most_rows, max(16, triton.next_power_of_2(max_rows)))
    return rows, tile if rows >= 64 else tile._replace(num_warps=4)


def prefill_attention(
    queries: Tensor,
    kv: PagedKV,
    starts: Tensor,
    max_queries: int,
    scores: Scores,
    *,
    lens: Tensor | None = None,
    tables: Tensor | None = None,
    is_padded: bool = False,
    is_recorded: bool = False,
) -> Tensor:
    """Causal attention of the last tokens of several sequences.

    Args:
        queries: (T, H, head_dim), contiguous, of all P sequences, behind each other.
        kv: with tables, its blocks of a multiple of 64 tokens; without keys and values are (T, H_kv, head_dim), heads
            contiguous, and have no scales.
        starts: (P + 1,) int32 where each sequence's queries begin.
        max_queries: of one sequence.
        scores: what becomes of them.
        lens: (P,) int32 tokens of each sequence, its queries the last of them; None: they are all.
        tables: (P, max_blocks) int32 block ids, with lens; only those within windows are read.
        is_padded: there are queries behind those of the last sequence; they get zeros.
        is_recorded: a graph of this size is recorded, and the kernel may be compiled for it; else for few sizes.

    Returns:
        (T, H, head_dim).

    Source: FlashAttention-2 (Dao, 2023).
    """
    num_kv_heads, head_dim = kv.keys.shape[-2], queries.shape[-1]
    group = queries.shape[1] // num_kv_heads
    rows, tile = _fitting_tile(head_dim, max_queries * group) if is_recorded else prefill_tile(head_dim)
    out = torch.zeros_like(queries) if is_padded else torch.empty_like(queries)
    is_paged = tables is not None
    num_tiles, num_sequences = triton.cdiv(max_queries * group, rows), len(starts) - 1
    num_splits = split_count(num_tiles * num_kv_heads * num_sequences) if is_paged else 1
    if not is_recorded:
        num_splits = 1 << (num_splits.bit_length() - 1)
    parts, stats = _room_for_parts(queries, num_splits) if num_splits > 1 else (None, None)
    _prefill_attention[(num_tiles * num_splits, num_kv_heads, num_sequences)](
        queries, *kv, starts, lens, tables, scores.sinks, out, parts, stats, *factors(scores),
        0 if tables is None else tables.stride(0), kv.keys.stride(-3), kv.values.stride(-3), num_kv_heads,
        GROUP=group, ROWS=rows, HEAD_DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=kv.keys.shape[1] if is_paged else 0, TILE=tile.num_tokens, IS_PAGED=is_paged, SPLITS=num_splits,
        **switches(scores), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if parts is not None and stats is not None:
        merge_queries(parts, stats, starts, scores.sinks, out, num_splits)
    return out


def split_count(num_programs: int) -> int:
    """Parts that the keys of each program are cut into."""
    return max(1, min(MAX_SPLITS // 2, _MAX_PROGRAMS // num_programs))


def _room_for_parts(queries: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
    """For what each part finds: weighted sums, (T * num_splits, H, head_dim), and (..., 2) their peaks and totals."""
    num_queries, num_heads, head_dim = queries.shape
    parts = queries.new_empty((num_queries * num_splits, num_heads, head_dim), dtype=torch.float32)
    return parts, queries.new_empty((num_queries * num_splits, num_heads, 2), dtype=torch.float32)


# Graphs have starts, lengths and tables at places of their own, and steps tables of any width.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["starts", "lens", "tables"])
def _prefill_attention(
    queries, keys, values, key_scales, value_scales, starts, lens, tables, sinks, out, parts, stats,
    scaling, softcap, window, table_stride, key_stride, value_stride, num_kv_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, IS_PAGED: tl.constexpr, SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One sequence, one KV head, rows of (query, head of its group), a part of the keys; scores are in powers of 2."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + sequence)
    num_queries = tl.load(starts + sequence + 1) - start
    length = tl.load(lens + sequence) if IS_PAGED else num_queries
    number, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    first_row = (tl.num_programs(0) // SPLITS - 1 - number) * ROWS  # those with most to do begin
    if first_row >= num_queries * GROUP:
        return
    row, dims = first_row + tl.arange(0, ROWS), tl.arange(0, DIMS)
    position = length - num_queries + row // GROUP
    earliest = length - num_queries + first_row // GROUP
    latest = tl.minimum(length - num_queries + (first_row + ROWS - 1) // GROUP, length - 1)
    place = (start + row // GROUP).to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + row % GROUP
    kept = (row < num_queries * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(queries + place[:, None] * HEAD_DIM + dims[None, :], mask=kept, other=0.0)
    keys, values = keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM
    if IS_PAGED:
        tables += sequence * table_stride
        if key_scales is not None:
            key_scales += kv_head * BLOCK_SIZE
            value_scales += kv_head * BLOCK_SIZE
    else:
        keys += start.to(tl.int64) * key_stride
        values += start.to(tl.int64) * value_stride
    peak, total, result = _attend(
        query, keys, values, key_scales, value_scales, tables, position, earliest, latest, split,
        scaling, softcap, window, key_stride, value_stride,
        HEAD_DIM, DIMS, BLOCK_SIZE, TILE, IS_PAGED, SPLITS, HAS_WINDOW, HAS_SOFTCAP,
    )  # fmt: skip
    if SPLITS == 1:
        place = out + place[:, None] * HEAD_DIM + dims[None, :]
        store_mean(place, kept, sinks, kv_head * GROUP + row % GROUP, peak, total, result, HAS_SINKS)
    else:
        query_row = (start + row // GROUP).to(tl.int64) * SPLITS + split
        item = query_row * (num_kv_heads * GROUP) + kv_head * GROUP + row % GROUP
        _store_part(parts, stats, item, row < num_queries * GROUP, dims, peak, total, result, HEAD_DIM)


@triton.jit
def _store_part(parts, stats, item, is_row, dims, peak, total, result, HEAD_DIM: tl.constexpr):
    """What rows have found in their part of the keys; of those that have seen none there, only that."""
    tl.store(stats + item * 2, peak, mask=is_row)
    tl.store(stats + item * 2 + 1, total, mask=is_row)
    kept = (is_row & (total > 0))[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(parts + item[:, None] * HEAD_DIM + dims[None, :], result, mask=kept)


@triton.jit
def _attend(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    position,
    earliest,
    latest,
    split,
    scaling,
    softcap,
    window,
    key_stride,
    value_stride,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IS_PAGED: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """A part of the keys that rows at `position`, from `earliest` to `latest`, see: peak, total and weighted sum."""
    # Tiles that the window cuts, those that every row sees whole, and those that the diagonal cuts.
    begin = 0
    whole_from = 0
    if HAS_WINDOW:
        begin = tl.maximum(earliest - window + 1, 0) // TILE * TILE
        whole_from = tl.maximum(tl.cdiv(tl.maximum(latest - window + 1, 0), TILE) * TILE, begin)
    whole_to = (earliest + 1) // TILE * TILE
    end = latest + 1
    if SPLITS > 1:
        num_keys = tl.cdiv(tl.cdiv(end - begin, TILE), SPLITS) * TILE
        begin = tl.minimum(begin + split * num_keys, end)
        end = tl.minimum(begin + num_keys, end)
        whole_from, whole_to = tl.maximum(whole_from, begin), tl.minimum(whole_to, end)
    whole_from = tl.minimum(whole_from, end)
    whole_to = tl.maximum(whole_to, whole_from)
    num_whole, num_before = (whole_to - whole_from) // TILE, tl.cdiv(whole_from - begin, TILE)
    num_cut = num_before + tl.cdiv(end - whole_to, TILE)
    peak, total, result = empty_softmax(query.shape[0], DIMS)
    peak, total, result = _attend_tiles(
        query, keys, values, key_scales, value_scales, tables, peak, total, result,
        num_whole, num_whole, whole_from, whole_from, end, position, scaling, softcap, window, key_stride, value_stride,
        HEAD_DIM, DIMS, BLOCK_SIZE, TILE, IS_PAGED, HAS_WINDOW, HAS_SOFTCAP, False,
    )  # fmt: skip
    return _attend_tiles(
        query, keys, values, key_scales, value_scales, tables, peak, total, result,
        num_cut, num_before, begin, whole_to, end, position, scaling, softcap, window, key_stride, value_stride,
        HEAD_DIM, DIMS, BLOCK_SIZE, TILE, IS_PAGED, HAS_WINDOW, HAS_SOFTCAP, True,
    )  # fmt: skip


@triton.jit
def _attend_tiles(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    peak,
    total,
    result,
    count,
    num_before,
    before,
    behind,
    end,
    position,
    scaling,
    softcap,
    window,
    key_stride,
    value_stride,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IS_PAGED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CUT: tl.constexpr,
):
    """So many tiles, some from `before` on, the others from `behind` on; if none is cut every row sees them whole."""
    dims, tokens = tl.arange(0, DIMS), tl.arange(0, TILE)
    for number in range(count):
        first = before + number * TILE
        if IS_CUT:
            first = tl.where(number < num_before, first, behind + (number - num_before) * TILE)
        if key_scales is None:
            slots = slots_of_tile(tables, first, tokens, BLOCK_SIZE) if IS_PAGED else (first + tokens).to(tl.int64)
            of_key = keys + slots[None, :] * key_stride + dims[:, None]
            of_value = values + slots[:, None] * value_stride + dims[None, :]
        else:
            codes, scales = codes_of_tile(tables, first, tokens, key_stride, HEAD_DIM, BLOCK_SIZE)
            of_key = keys + codes[None, :] + dims[:, None]
            of_value = values + codes[:, None] + dims[None, :]
        inside = first + tokens < end
        key = _load(of_key, inside[None, :], (dims < HEAD_DIM)[:, None], IS_CUT, HEAD_DIM == DIMS)
        if key_scales is not None:
            scale = _load(key_scales + scales, inside, inside, IS_CUT, True)
            key = (key.to(tl.float32) * scale[None, :]).to(query.dtype)
        scores = tl.dot(query, key) * scaling
        if HAS_SOFTCAP:
            scores = squash(scores, softcap)
        if IS_CUT:
            scores = unseen_out(scores, position, first + tokens, window, HAS_WINDOW)
        peak, total, weights, shrink = weigh(scores, peak, total, MAY_SEE_NOTHING=IS_CUT)
        value = _load(of_value, inside[:, None], (dims < HEAD_DIM)[None, :], IS_CUT, HEAD_DIM == DIMS)
        if value_scales is not None:
            scale = _load(value_scales + scales, inside, inside, IS_CUT, True)
            value = (value.to(tl.float32) * scale[:, None]).to(query.dtype)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None])
    return peak, total, result


@triton.jit
def _load(place, is_token, is_dim, IS_CUT: tl.constexpr, HAS_ALL_DIMS: tl.constexpr):
    """Keys or values of a tile: of tokens only where some of a cut tile do not exist, likewise of dimensions."""
    if IS_CUT:
        part = tl.load(place, mask=is_token & is_dim, other=0.0)
    elif HAS_ALL_DIMS:
        part = tl.load(place)
    else:
        part = tl.load(place, mask=is_dim, other=0.0)
    return part
