"""Attention of decodes with drafts over a paged pool on a GPU, in Triton: several queries for each sequence.

As of one query: a plan cuts sequences into items (`cuda_splits.py`), and each program walks along the keys of one. Its
rows are queries times the heads that share keys. A tile has as many rows as the kernel of one query pads its heads to,
so that up to there more queries cost nothing. Further tiles read the same keys beside the first, from the L2 cache.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV, Scores
from deployments.engine.kernels.cuda_attention import decode_tile
from deployments.engine.kernels.cuda_items import attend_item
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_scores import empty_softmax, factors, store_mean, switches
from deployments.engine.kernels.cuda_splits import MAX_SPLITS, Splits, merge_head, plan_splits

# Of a program: no tensor core multiplies fewer.
_ROWS = 16


@dataclass(frozen=True, slots=True)
class Runs:
    """The newest tokens of S sequences, T in all, behind each other; there may be fewer than T.

    Attributes:
        lens: (S,) int32 tokens of each sequence, these included; 0: there is none.
        starts: (S + 1,) int32 where each one's tokens begin.
        owners: (T,) int32 whose each token is; negative: nobody's.
        max_queries: of one sequence.
    """

    lens: Tensor
    starts: Tensor
    owners: Tensor
    max_queries: int

    def num_row_tiles(self, group: int) -> int:
        """Programs that a KV head with so many heads takes for each item."""
        return -(-self.max_queries * group // _ROWS)


def plan_verification(runs: Runs, num_heads: int, kv: PagedKV, max_tokens: int, window: int | None) -> Splits:
    """Plan the attention of one step, for all layers that see as far.

    Args:
        runs: of the step.
        num_heads: of the queries.
        kv: of any of these layers.
        max_tokens: that a sequence may have.
        window: of the layers; None: all keys are seen.
    """
    num_seqs, (num_kv_heads, head_dim) = len(runs.lens), kv.keys.shape[2:]
    tile = decode_tile(head_dim, num_seqs * num_kv_heads, is_fp8=kv.key_scales is not None)
    # From the first key on that the first of its queries sees.
    widened = None if window is None else window + runs.max_queries - 1
    splits = plan_splits(runs.lens, num_kv_heads, tile, max_tokens, widened)
    num_tiles = runs.num_row_tiles(num_heads // num_kv_heads)
    finished = torch.zeros((num_seqs, num_kv_heads * num_tiles), dtype=torch.int32, device=runs.lens.device)
    return splits._replace(finished=finished)


def verification_attention(
    queries: Tensor, kv: PagedKV, tables: Tensor, runs: Runs, splits: Splits, scores: Scores, out: Tensor
) -> None:
    """Causal attention of the newest tokens of several sequences over a paged pool that holds them already.

    Args:
        queries: (T, H, head_dim), contiguous.
        kv: its blocks of a multiple of 64 tokens, in FP8 of 128.
        tables: (S, max_blocks) int32 block ids; only those within windows are read.
        runs: which queries are whose.
        splits: as `plan_verification` makes it.
        scores: what becomes of them.
        out: (T, H, head_dim), contiguous; written, but for queries that are nobody's.

    Source: as `decode_attention`; queries as rows beside the heads of a group, after FlashInfer (Ye et al., 2025).
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_items, num_kv_heads = len(splits.items), kv.keys.shape[2]
    group = num_heads // num_kv_heads
    tile = decode_tile(head_dim, len(runs.lens) * num_kv_heads, is_fp8=kv.key_scales is not None)
    rows_of_head, num_row_tiles = runs.max_queries * group, runs.num_row_tiles(group)
    parts = torch.empty((num_items, num_kv_heads, rows_of_head, head_dim), dtype=torch.float32, device=out.device)
    stats = torch.empty((num_items, num_kv_heads, rows_of_head, 2), dtype=torch.float32, device=out.device)
    dims = triton.next_power_of_2(head_dim)
    # Beside each other run all who read the same keys, then all heads of an item.
    _verify[(num_kv_heads * num_row_tiles, num_items)](
        queries, *kv, tables, runs.lens, runs.starts, splits.items, splits.spans, splits.finished, scores.sinks,
        out, parts, stats, *factors(scores), tables.stride(0), num_kv_heads, rows_of_head,
        GROUP=group, ROWS=_ROWS, ROW_TILES=num_row_tiles, HEAD_DIM=head_dim, DIMS=dims,
        BLOCK_SIZE=kv.keys.shape[1], TILE=tile.num_tokens, WIDTH=splits.items.shape[1], MERGES=not splits.is_cut,
        **switches(scores), num_warps=tile.num_warps, num_stages=tile.num_stages, **OVERLAPPING,
    )  # fmt: skip
    if splits.is_cut:
        _merge[(num_tokens, num_heads)](
            parts, stats, splits.spans, runs.starts, runs.owners, scores.sinks, out, num_kv_heads, rows_of_head,
            GROUP=group, HEAD_DIM=head_dim, DIMS=dims, SPLITS=MAX_SPLITS, HAS_SINKS=scores.sinks is not None,
            num_warps=2, **OVERLAPPING,
        )  # fmt: skip


@triton.jit
def _verify(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    lens,
    starts,
    items,
    spans,
    finished,
    sinks,
    out,
    parts,
    stats,
    scaling,
    softcap,
    window,
    table_stride,
    num_kv_heads,
    rows_of_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One item of the plan, one KV head, and a tile of rows (query, head). Scores are in powers of two."""
    wait_for_earlier(OVERLAPS)
    kv_head, row_tile, item = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES, tl.program_id(1)
    entry = items + item * WIDTH
    sequence, begin, start, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    if sequence < 0:
        return
    first = tl.load(starts + sequence)
    num_rows = (tl.load(starts + sequence + 1) - first) * GROUP
    if row_tile * ROWS >= num_rows:
        return
    row, dims = row_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIMS)
    position = tl.load(lens + sequence) - num_rows // GROUP + row // GROUP
    head, kept = kv_head * GROUP + row % GROUP, (row < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    at = ((first + row // GROUP).to(tl.int64) * (num_kv_heads * GROUP) + head)[:, None] * HEAD_DIM + dims[None, :]
    peak, total, result = attend_item(
        tl.load(queries + at, mask=kept, other=0.0), keys, values, key_scales, value_scales,
        tables + sequence * table_stride, begin, tl.multiple_of(start, TILE), end, kv_head, num_kv_heads,
        scaling, softcap, position, window, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP, True,
    )  # fmt: skip
    _store(
        peak, total, result, row < num_rows, kept, row, head, out + at, parts, stats, spans, finished, sinks,
        sequence, kv_head, row_tile, item, num_kv_heads, rows_of_head,
        ROWS, ROW_TILES, HEAD_DIM, DIMS, MERGES, HAS_SINKS,
    )  # fmt: skip


@triton.jit
def _store(
    peak,
    total,
    result,
    is_row,
    kept,
    row,
    head,
    to,
    parts,
    stats,
    spans,
    finished,
    sinks,
    sequence,
    kv_head,
    row_tile,
    item,
    num_kv_heads,
    rows_of_head,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The result of an item: the output, where it is all of its sequence, else a part of it to be merged."""
    first, count, dims = tl.load(spans + sequence * 2), tl.load(spans + sequence * 2 + 1), tl.arange(0, DIMS)
    if count == 1:
        store_mean(to, kept, sinks, head, peak, total, result, HAS_SINKS)
    else:
        place = (item.to(tl.int64) * num_kv_heads + kv_head) * rows_of_head + row
        tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], result, mask=kept)
        tl.store(stats + place * 2, peak, mask=is_row)
        tl.store(stats + place * 2 + 1, total, mask=is_row)
        if MERGES:
            # All threads have stored before one of them counts; the last program sees what the others stored.
            tl.debug_barrier()
            counter = finished + (sequence * num_kv_heads + kv_head) * ROW_TILES + row_tile
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
                tl.store(counter, 0)
                place = (first.to(tl.int64) * num_kv_heads + kv_head) * rows_of_head + row
                _merge_rows(
                    parts, stats, sinks, to, kept, head, place, num_kv_heads * rows_of_head, is_row, count,
                    ROWS, HEAD_DIM, DIMS, HAS_SINKS,
                )  # fmt: skip


@triton.jit
def _merge_rows(
    parts,
    stats,
    sinks,
    to,
    kept,
    head,
    place,
    stride,
    is_row,
    count,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Rows of one sequence from its items, always in their order: of each row `count` parts from `place` on."""
    dims = tl.arange(0, DIMS)
    peak, total, result = empty_softmax(ROWS, DIMS)
    for _ in range(count):
        # Not from the L1 cache, which does not see what other multiprocessors have stored.
        own_peak = tl.load(stats + place * 2, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        own_total = tl.load(stats + place * 2 + 1, mask=is_row, other=0.0, cache_modifier=".cg")
        part = tl.load(parts + place[:, None] * HEAD_DIM + dims[None, :], mask=kept, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, own_peak)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, share = tl.exp2(peak - base), tl.exp2(own_peak - base)
        total = total * shrink + own_total * share
        result = result * shrink[:, None] + part * share[:, None]
        peak, place = higher, place + stride
    store_mean(to, kept, sinks, head, peak, total, result, HAS_SINKS)


@triton.jit
def _merge(
    parts,
    stats,
    spans,
    starts,
    owners,
    sinks,
    out,
    num_kv_heads,
    rows_of_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One head of one query."""
    wait_for_earlier(OVERLAPS)
    token, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(owners + token)
    if sequence < 0:
        return
    count = tl.load(spans + sequence * 2 + 1)
    if count > 1:
        row = (token - tl.load(starts + sequence)) * GROUP + head % GROUP
        first = (tl.load(spans + sequence * 2).to(tl.int64) * num_kv_heads + head // GROUP) * rows_of_head + row
        merge_head(
            parts, stats, sinks, out + (token.to(tl.int64) * (num_kv_heads * GROUP) + head) * HEAD_DIM, head,
            first, num_kv_heads * rows_of_head, count, HEAD_DIM, DIMS, SPLITS, HAS_SINKS,
        )  # fmt: skip
