"""Attention of decodes over a paged pool on a GPU, and what comes before it, in Triton; bfloat16 and float16."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_SPLITS = 32
# A decode attention of fewer programs than this leaves multiprocessors idle (H100: 132).
_ENOUGH_PROGRAMS = 264
_LOG2_E = 1.4426950408889634


def rotate_and_write(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    keep_keys: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of queries and keys; keys and values go into the paged pool.

    Args:
        queries: (T, H, head_dim), heads contiguous, tokens at equal distances.
        keys: (T, H_kv, head_dim), as the queries.
        values: as the keys.
        cos: (T, head_dim), contiguous; both halves are equal.
        sin: as cos.
        key_pool: (num_slots, H_kv, head_dim), contiguous; of one layer.
        value_pool: as the key pool.
        slots: (T,) int32 or int64; tokens with a negative slot are padding and are not written.
        keep_keys: give the rotated keys back as well.

    Returns:
        The rotated queries, (T, H, head_dim), contiguous, and the rotated keys, (T, H_kv, head_dim), or None.

    Source: RoFormer (Su et al., 2021); the layout is GPT-NeoX's.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    new_keys = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device) if keep_keys else None
    heads = min(8, triton.next_power_of_2(max(num_heads, num_kv_heads)))
    parts = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
    _rotate_and_write[(num_tokens, parts[0] + 2 * parts[1])](
        queries,
        keys,
        values,
        cos,
        sin,
        key_pool,
        value_pool,
        slots,
        out,
        new_keys,
        queries.stride(0),
        keys.stride(0),
        values.stride(0),
        num_heads,
        num_kv_heads,
        parts[0],
        parts[1],
        HEADS=heads,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        KEEP_KEYS=keep_keys,
        num_warps=4 if heads * head_dim >= 512 else 1,
    )
    return out, new_keys


def decode_attention(
    queries: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lens: Tensor, scaling: float
) -> Tensor:
    """Attention of one query per sequence over a paged pool.

    Args:
        queries: (D, H, head_dim), contiguous; head_dim a power of two.
        keys: (num_blocks, block_size, H_kv, head_dim), contiguous; block_size a multiple of 64.
        values: as the keys.
        tables: (D, max_blocks) int32 block ids.
        lens: (D,) int32 tokens, the new one included; sequences of length 0 are padding and give zeros.
        scaling: of the scores.

    Returns:
        (D, H, head_dim).

    Source: PagedAttention (Kwon et al., SOSP 2023); splits and their merging from Flash-Decoding (Dao et al., 2023).
    """
    num_seqs, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    num_splits = choose_splits(num_seqs * num_kv_heads, tables.shape[1] * keys.shape[1])
    out = torch.empty_like(queries)
    parts = torch.empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32, device=queries.device)
    stats = torch.empty((num_seqs, num_heads, num_splits, 2), dtype=torch.float32, device=queries.device)
    _decode_attention[(num_seqs, num_kv_heads, num_splits)](
        queries,
        keys,
        values,
        tables,
        lens,
        out,
        parts,
        stats,
        scaling * _LOG2_E,
        tables.stride(0),
        num_kv_heads,
        num_splits,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=keys.shape[1],
        TILE=64,
        WHOLE=num_splits == 1,
        num_warps=4,
        num_stages=3,
    )
    if num_splits > 1:
        _merge_splits[(num_seqs * num_heads,)](
            parts, stats, out, num_splits, HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(num_splits), num_warps=2
        )
    return out


def choose_splits(num_programs: int, max_tokens: int) -> int:
    """Parts that each sequence is cut into, so that enough programs run; fixed by shapes, as a CUDA graph needs it."""
    wanted = -(-_ENOUGH_PROGRAMS // num_programs)
    return max(1, min(wanted, -(-max_tokens // 64), _MAX_SPLITS))


@triton.jit
def _rotate_and_write(
    queries,
    keys,
    values,
    cos,
    sin,
    key_pool,
    value_pool,
    slots,
    out,
    new_keys,
    query_stride,
    key_stride,
    value_stride,
    num_heads,
    num_kv_heads,
    query_parts,
    kv_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
):
    """One token and some heads: of the queries, then of the keys, then of the values."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, HALF)[None, :]
    low = j < HEAD_DIM // 2
    slot = tl.load(slots + token).to(tl.int64)
    if part < query_parts:
        heads = (part * HEADS + tl.arange(0, HEADS))[:, None]
        source = queries + token * query_stride + heads * HEAD_DIM
        target = out + (token * num_heads + heads) * HEAD_DIM
        inside = (heads < num_heads) & low
    elif part < query_parts + kv_parts:
        heads = ((part - query_parts) * HEADS + tl.arange(0, HEADS))[:, None]
        source = keys + token * key_stride + heads * HEAD_DIM
        target = key_pool + (slot * num_kv_heads + heads) * HEAD_DIM
        inside = (heads < num_kv_heads) & low
    else:
        heads = ((part - query_parts - kv_parts) * HEADS + tl.arange(0, HEADS))[:, None]
        source = values + token * value_stride + heads * HEAD_DIM
        target = value_pool + (slot * num_kv_heads + heads) * HEAD_DIM
        inside = (heads < num_kv_heads) & low
    a = tl.load(source + j, mask=inside, other=0.0)
    b = tl.load(source + HEAD_DIM // 2 + j, mask=inside, other=0.0)
    if part < query_parts + kv_parts:
        c = tl.load(cos + token * HEAD_DIM + j, mask=low, other=0.0).to(tl.float32)
        s = tl.load(sin + token * HEAD_DIM + j, mask=low, other=0.0).to(tl.float32)
        first, second = a.to(tl.float32), b.to(tl.float32)
        a = (first * c - second * s).to(a.dtype)
        b = (second * c + first * s).to(b.dtype)
    if KEEP_KEYS:  # noqa: SIM102  # Triton decides this one when it compiles, the next one on the GPU
        if (part >= query_parts) & (part < query_parts + kv_parts):
            kept = new_keys + (token * num_kv_heads + heads) * HEAD_DIM
            tl.store(kept + j, a, mask=inside)
            tl.store(kept + HEAD_DIM // 2 + j, b, mask=inside)
    inside &= (part < query_parts) | (slot >= 0)
    tl.store(target + j, a, mask=inside)
    tl.store(target + HEAD_DIM // 2 + j, b, mask=inside)


@triton.jit
def _decode_attention(
    queries,
    keys,
    values,
    tables,
    lens,
    out,
    parts,
    stats,
    scaling,
    table_stride,
    num_kv_heads,
    num_splits,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One sequence, one KV head with its group of queries, one split. Scores are in powers of two."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + sequence)
    per_split = tl.cdiv(tl.cdiv(length, TILE), num_splits) * TILE
    start = split * per_split
    end = tl.minimum(length, start + per_split)
    g, dims, tokens = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    head = (sequence.to(tl.int64) * num_kv_heads + kv_head) * GROUP + g
    query = tl.load(queries + head[:, None] * HEAD_DIM + dims[None, :], mask=(g < GROUP)[:, None], other=0.0)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(start, end, TILE):
        block = tl.load(tables + sequence * table_stride + first // BLOCK_SIZE).to(tl.int64)
        slots = block * BLOCK_SIZE + first % BLOCK_SIZE + tokens
        at = (slots[:, None] * num_kv_heads + kv_head) * HEAD_DIM + dims[None, :]
        inside = first + tokens < end
        key = tl.load(keys + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scaling
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(values + at, mask=inside[:, None], other=0.0)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None])
        peak = higher
    kept = (g < GROUP)[:, None]
    if WHOLE:
        normalised = result / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + head[:, None] * HEAD_DIM + dims[None, :], normalised.to(out.dtype.element_ty), mask=kept)
    else:
        place = head * num_splits + split
        tl.store(parts + place[:, None] * HEAD_DIM + dims[None, :], result, mask=kept)
        tl.store(stats + place * 2, peak, mask=g < GROUP)
        tl.store(stats + place * 2 + 1, total, mask=g < GROUP)


@triton.jit
def _merge_splits(parts, stats, out, num_splits, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """One head of one sequence."""
    head = tl.program_id(0).to(tl.int64)
    split, dims = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    inside = split < num_splits
    place = head * num_splits + split
    peaks = tl.load(stats + place * 2, mask=inside, other=float("-inf"))
    totals = tl.load(stats + place * 2 + 1, mask=inside, other=0.0)
    peak = tl.maximum(tl.max(peaks, axis=0), -1e30)  # of padding every peak is -inf, and -inf less itself no number
    weights = tl.exp2(peaks - peak)
    total = tl.sum(weights * totals, axis=0)
    part = tl.load(parts + place[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None], other=0.0)
    merged = tl.sum(tl.where(totals[:, None] > 0, part * weights[:, None], 0.0), axis=0)
    tl.store(out + head * HEAD_DIM + dims, (merged / tl.where(total > 0, total, 1.0)).to(out.dtype.element_ty))
