"""Which program of a decode attention computes what, and how parts become whole, in Triton.

Long sequences are computed in parts, so that programs end together. Lengths are known on the GPU alone when a CUDA
graph is replayed, so the plan is made there, once for all layers.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier

MAX_SPLITS = 32
_WIDTH = 4
_ITEMS_PER_PROGRAM = 16
# With more the kernel takes long to compile: 2,048 a second, 4,096 seven, 32,768 more than anybody waits.
_SEQS_AT_ONCE = 512


class DecodeTile(NamedTuple):
    """How a program of a decode attention walks along the keys, and how many programs do well.

    Attributes:
        num_tokens: of a tile; parts begin at multiples of it.
        num_warps: of a program.
        num_stages: tiles on their way from memory at once, and the one that is computed.
        min_programs: fewer leave multiprocessors idle (132 of them, H100 and H200), if sequences are equally long.
        max_programs: more are not worth their merging, if there are enough.
    """

    num_tokens: int
    num_warps: int
    num_stages: int
    min_programs: int = 400
    max_programs: int = 528


class Splits(NamedTuple):
    """A plan for sequences of D decodes.

    Attributes:
        items: (N, 4) int32, a row for each KV head's program: sequence (negative: nothing to do), first key within the
            window, first and end of the keys to attend to.
        spans: (D, 2) int32, of each sequence the first item and how many there are.
        finished: (D, H_kv) int32 zeros, in which items are counted as they end. Whoever counts leaves it as it was.
        is_cut: most sequences are cut, since without that too few programs would run.
    """

    items: Tensor
    spans: Tensor
    finished: Tensor
    is_cut: bool


def plan_splits(lens: Tensor, num_kv_heads: int, tile: DecodeTile, max_tokens: int, window: int | None) -> Splits:
    """Cut sequences into parts that are as long as what each program would get of all keys, or shorter.

    Args:
        lens: (D,) int32 tokens of each sequence.
        num_kv_heads: programs that each item becomes.
        tile: of the attention.
        max_tokens: that a sequence may have.
        window: of the layers; None: all keys are seen.

    Source: after the scheduler of FlashAttention 3 (Shah et al., 2024) for sequences of several lengths.
    """
    num_seqs = len(lens)
    if window is not None:
        max_tokens = min(max_tokens, window + tile.num_tokens)
    max_splits = max(1, min(-(-max_tokens // 64), MAX_SPLITS))
    parts = -(-tile.min_programs // (num_seqs * num_kv_heads))  # of each, were they equally long
    target = num_seqs * parts if parts > 1 else min(num_seqs, -(-tile.max_programs // num_kv_heads))
    num_items = min(num_seqs + target, num_seqs * max_splits)
    items = torch.empty((num_items, _WIDTH), dtype=torch.int32, device=lens.device)
    spans = torch.empty((num_seqs, 2), dtype=torch.int32, device=lens.device)
    finished = torch.empty((num_seqs, num_kv_heads), dtype=torch.int32, device=lens.device)
    _plan_splits[(-(-num_items // _ITEMS_PER_PROGRAM),)](
        lens,
        items,
        spans,
        finished,
        num_seqs,
        num_items,
        target,
        max_splits,
        window or 0,
        num_kv_heads,
        SEQS=min(_SEQS_AT_ONCE, max(16, triton.next_power_of_2(num_seqs))),
        ITEMS=_ITEMS_PER_PROGRAM,
        WIDTH=_WIDTH,
        HEADS=triton.next_power_of_2(num_kv_heads),
        TILE=tile.num_tokens,
        HAS_WINDOW=window is not None,
        **OVERLAPPING,
    )
    return Splits(items, spans, finished, is_cut=parts > 1)


def merge(parts: Tensor, stats: Tensor, spans: Tensor, sinks: Tensor | None, out: Tensor) -> None:
    """Put the parts of each sequence together.

    Args:
        parts: (N, H, head_dim) float32 weighted sums, a row for each item.
        stats: (N, H, 2) float32 peak and total of their scores, in powers of two.
        spans: see `Splits`.
        sinks: (H,) of the layer; None: it has none.
        out: (D, H, head_dim), written where a sequence has several parts.
    """
    num_seqs, num_heads, head_dim = out.shape
    _merge_parts[(num_seqs, num_heads)](
        parts,
        stats,
        spans,
        sinks,
        out,
        num_heads,
        HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim),
        SPLITS=MAX_SPLITS,
        HAS_SINKS=sinks is not None,
        num_warps=2,
        **OVERLAPPING,
    )


def merge_queries(
    parts: Tensor, stats: Tensor, starts: Tensor, sinks: Tensor | None, out: Tensor, num_splits: int
) -> None:
    """As `merge`, of queries whose keys were cut into as many parts each; those behind the last sequence are left.

    Args:
        parts: (T * num_splits, H, head_dim) float32; where nothing was seen it may hold anything.
        stats: (T * num_splits, H, 2) float32.
        starts: (P + 1,) int32 where each sequence's queries begin.
        sinks: (H,) of the layer; None: it has none.
        out: (T, H, head_dim).
        num_splits: of each query.
    """
    num_queries, num_heads, head_dim = out.shape
    _merge_queries[(num_queries, num_heads)](
        parts, stats, starts, sinks, out, len(starts) - 1, num_heads, HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim), COUNT=num_splits, SPLITS=triton.next_power_of_2(num_splits),
        HAS_SINKS=sinks is not None, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_seqs", "num_items", "target", "max_splits"])  # which any step has of its own
def _plan_splits(
    lens,
    items,
    spans,
    finished,
    num_seqs,
    num_items,
    target,
    max_splits,
    window,
    num_kv_heads,
    SEQS: tl.constexpr,
    ITEMS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Rows of some items; each program looks at all lengths. There are items enough: target, and one a sequence."""
    wait_for_earlier(OVERLAPS)
    longest = _longest_part(lens, num_seqs, target, max_splits, window, SEQS, TILE, HAS_WINDOW)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    # Of the sequence that has an item: its number and one, and its first key, its end and where this part starts.
    owner = tl.zeros((ITEMS,), tl.int32)
    own_begin = tl.zeros((ITEMS,), tl.int32)
    own_start = tl.zeros((ITEMS,), tl.int32)
    own_end = tl.zeros((ITEMS,), tl.int32)
    num_before = tl.zeros((), tl.int32)
    for start in range(0, num_seqs, SEQS):
        sequences = start + tl.arange(0, SEQS)
        length, begin, first_tile, num_tiles = _tiles_of(lens, sequences, num_seqs, window, TILE, HAS_WINDOW)
        count = tl.where(sequences < num_seqs, tl.maximum(tl.cdiv(num_tiles, longest), 1), 0)
        first = num_before + tl.cumsum(count) - count
        part = item[:, None] - first[None, :]
        is_own = (part >= 0) & (part < count[None, :])
        tiles_of_part = tl.cdiv(num_tiles, tl.maximum(count, 1))
        of_part = (first_tile[None, :] + part * tiles_of_part[None, :]) * TILE
        end_of_part = tl.minimum(length[None, :], of_part + (tiles_of_part * TILE)[None, :])
        owner += _of_own(is_own, (sequences + 1)[None, :])
        own_begin += _of_own(is_own, begin[None, :])
        own_start += _of_own(is_own, of_part)
        own_end += _of_own(is_own, end_of_part)
        # Of each sequence, by the program that has the item of its number: there are no fewer items than sequences.
        is_here = (sequences // ITEMS == tl.program_id(0)) & (sequences < num_seqs)
        tl.store(spans + sequences * 2, first, mask=is_here)
        tl.store(spans + sequences * 2 + 1, count, mask=is_here)
        num_before += tl.sum(count)

    row = items + item * WIDTH
    is_item = item < num_items
    tl.store(row, owner - 1, mask=is_item)
    tl.store(row + 1, own_begin, mask=is_item)
    tl.store(row + 2, own_start, mask=is_item)
    tl.store(row + 3, own_end, mask=is_item)
    heads = tl.arange(0, HEADS)
    counter = finished + item[:, None] * num_kv_heads + heads[None, :]
    tl.store(counter, 0, mask=(item < num_seqs)[:, None] & (heads < num_kv_heads)[None, :])


@triton.jit
def _longest_part(
    lens, num_seqs, target, max_splits, window, SEQS: tl.constexpr, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Tiles of a part: what each program would get of all, and no less than a sequence of the most parts needs."""
    total = tl.zeros((), tl.int32)
    most = tl.zeros((), tl.int32)
    for start in range(0, num_seqs, SEQS):
        _, _, _, num_tiles = _tiles_of(lens, start + tl.arange(0, SEQS), num_seqs, window, TILE, HAS_WINDOW)
        total += tl.sum(num_tiles)
        most = tl.maximum(most, tl.max(num_tiles))
    return tl.maximum(tl.maximum(tl.cdiv(total, target), tl.cdiv(most, max_splits)), 1)


@triton.jit
def _tiles_of(lens, sequences, num_seqs, window, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Of each sequence: its length, the first key that is seen, the tile that holds it, and how many there are."""
    length = tl.load(lens + sequences, mask=sequences < num_seqs, other=0)
    begin = tl.zeros_like(length)
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    first_tile = begin // TILE
    return length, begin, first_tile, tl.cdiv(length, TILE) - first_tile


@triton.jit
def _of_own(is_own, values):
    """Of each item, the value of its sequence; 0 if that is none of these."""
    return tl.sum(tl.where(is_own, values, 0), axis=1)


@triton.jit
def merge_if_last(
    parts,
    stats,
    spans,
    finished,
    sinks,
    out,
    sequence,
    kv_head,
    count,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Whoever ends last of a sequence's items merges them, the group of heads one by one."""
    # All threads have stored before one of them counts; the last program sees what the others stored.
    tl.debug_barrier()
    counter = finished + sequence * num_kv_heads + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
        tl.store(counter, 0)
        first, num_heads = tl.load(spans + sequence * 2), num_kv_heads * GROUP
        for number in range(GROUP):
            head = kv_head * GROUP + number
            merge_head(
                parts, stats, sinks, out + (sequence.to(tl.int64) * num_heads + head) * HEAD_DIM, head,
                first.to(tl.int64) * num_heads + head, num_heads, count, HEAD_DIM, DIMS, SPLITS, HAS_SINKS,
            )  # fmt: skip


@triton.jit
def _merge_parts(
    parts,
    stats,
    spans,
    sinks,
    out,
    num_heads,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One head of one sequence."""
    wait_for_earlier(OVERLAPS)
    sequence, head = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(spans + sequence * 2), tl.load(spans + sequence * 2 + 1)
    if count > 1:
        merge_head(
            parts, stats, sinks, out + (sequence.to(tl.int64) * num_heads + head) * HEAD_DIM, head,
            first.to(tl.int64) * num_heads + head, num_heads, count, HEAD_DIM, DIMS, SPLITS, HAS_SINKS,
        )  # fmt: skip


# As `_prefill_attention`, whose graphs and steps have these at other places.
@triton.jit(do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["starts"])
def _merge_queries(
    parts, stats, starts, sinks, out, num_sequences, num_heads,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One head of one query."""
    query, head = tl.program_id(0), tl.program_id(1)
    if query < tl.load(starts + num_sequences):
        merge_head(
            parts, stats, sinks, out + (query.to(tl.int64) * num_heads + head) * HEAD_DIM, head,
            query.to(tl.int64) * COUNT * num_heads + head, num_heads, COUNT, HEAD_DIM, DIMS, SPLITS, HAS_SINKS,
        )  # fmt: skip


@triton.jit
def merge_head(
    parts,
    stats,
    sinks,
    to,
    head,
    first,
    stride,
    count,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One head of one query from its items, in their order: `count` rows of parts from `first` on, some of no keys."""
    split, dims = tl.arange(0, SPLITS), tl.arange(0, DIMS)
    inside = split < count
    place = first + split.to(tl.int64) * stride
    # Not from the L1 cache, which does not see what other multiprocessors have stored.
    peaks = tl.load(stats + place * 2, mask=inside, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(stats + place * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
    loaded = (totals > 0)[:, None] & (dims < HEAD_DIM)[None, :]
    at = place[:, None] * HEAD_DIM + dims[None, :]
    part = tl.load(parts + at, mask=loaded, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, axis=0)
    share = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
        share = tl.exp2(sink - peak)
    weights = tl.exp2(peaks - peak)
    total = tl.sum(weights * totals, axis=0) + share
    merged = tl.sum(part * weights[:, None], axis=0) / total
    tl.store(to + dims, merged.to(to.dtype.element_ty), mask=dims < HEAD_DIM)
