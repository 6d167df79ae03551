"""Attention of decodes over a paged pool on a GPU, in Triton; bfloat16 and float16, keys and values also in FP8."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV, Scores
from deployments.engine.kernels.cuda_items import attend_item
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier
from deployments.engine.kernels.cuda_scores import factors, store_mean, switches
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


@triton.jit(do_not_specialize=["table_stride"])  # or steps of other sizes would compile their own
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
    peak, total, result = attend_item(
        query, keys, values, key_scales, value_scales, tables + sequence * table_stride, begin, start, end, kv_head,
        num_kv_heads, scaling, softcap, None, None, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP, False,
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
