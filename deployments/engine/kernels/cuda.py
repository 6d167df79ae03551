"""Kernels that torch lacks on a GPU, in Triton; bfloat16 and float16. Imported only where there is one.

All of them may be recorded in a CUDA graph: their grids depend on shapes alone, and lengths are read on the GPU.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

# Products of more rows are torch's: cuBLAS is then bound by arithmetic and better at it, with many columns later.
_MAX_ROWS, _MAX_ROWS_OF_WIDE, _WIDE = 32, 64, 16384
_MAX_SPLITS = 32
# A decode attention of fewer programs than this leaves multiprocessors idle (H100: 132).
_ENOUGH_PROGRAMS = 264
_LOG2_E = 1.4426950408889634


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, round, and scale, as transformers' models do.

    Args:
        x: (..., M, N), where the M rows lie at equal distances, and so do the groups of them; two dimensions at least.
        weight: (N,).
        eps: added to the mean square.

    Returns:
        As x, contiguous.

    Source: RMSNorm (Zhang and Sennrich, 2019).
    """
    num_rows, size = x.shape[-2:]
    groups = x.reshape(-1, num_rows, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    num_warps = 8 if block >= 4096 else 4 if block >= 1024 else 1
    _rms_norm[(len(groups) * num_rows,)](
        groups, weight, out, num_rows, *groups.stride()[:2], eps, size, BLOCK=block, num_warps=num_warps
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation: silu(gate) * up.

    Args:
        gate_up: (..., 2 * N), the gate's outputs before the others; contiguous.

    Returns:
        (..., N).

    Source: GLU variants (Shazeer, 2020).
    """
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    num_rows, block = out.numel() // size, min(1024, triton.next_power_of_2(size))
    _silu_mul[(num_rows, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block, num_warps=4)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product for few rows, which is bound by reading the weight once.

    Args:
        x: (..., K), contiguous.
        weight: (N, K), contiguous.
        bias: (N,).

    Returns:
        (..., N).
    """
    depth = x.shape[-1]
    num_rows, num_columns = x.numel() // depth, len(weight)
    if num_rows > (_MAX_ROWS_OF_WIDE if num_columns >= _WIDE else _MAX_ROWS) or depth % 8:
        return functional.linear(x, weight, bias)
    out = torch.empty((*x.shape[:-1], num_columns), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    if num_rows == 1:
        _product_of_row(x, weight, bias, out)
    else:
        _product_of_rows(x, weight, bias, out, num_rows)
    return out


def _product_of_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    num_columns, depth = weight.shape
    block, num_warps = (1024, 4) if depth <= 1024 else (2048, 8)
    _linear_of_row[(triton.cdiv(num_columns, 2),)](
        x, weight, bias, out, num_columns, depth, HAS_BIAS=bias is not None, COLUMNS=2, BLOCK=block, num_warps=num_warps
    )


def _product_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_rows: int) -> None:
    num_columns, depth = weight.shape
    rows = max(16, triton.next_power_of_2(num_rows))
    columns, block, num_stages, num_warps = skinny_tile(num_columns, rows)
    _linear_of_rows[(triton.cdiv(num_columns, columns),)](
        x,
        weight,
        bias,
        out,
        num_rows,
        num_columns,
        depth,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=block,
        num_stages=num_stages,
        num_warps=num_warps,
    )


def skinny_tile(num_columns: int, num_rows: int) -> tuple[int, int, int, int]:
    """Columns and depth of a program's tile, its stages and warps: the best of those tried on an H100 (docs/log.md).

    Args:
        num_columns: of the weight.
        num_rows: of the tile: 16, 32 or 64.
    """
    if num_columns <= 2048:  # narrow tiles, so that there are enough programs
        return 16, 512 if num_rows == 16 else 256, 3, 4
    if num_columns <= 4096:
        return 32, 256, 5 if num_rows <= 32 else 3, 4
    return (64, 256, 3, 4) if num_rows == 16 else (64, 128, 5, 4)


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
def _rms_norm(x, weight, out, num_rows, group_stride, row_stride, eps, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row // num_rows * group_stride + row % num_rows * row_stride
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    rounded = (value * scale).to(out.dtype.element_ty)
    tl.store(out + row * size + at, rounded * tl.load(weight + at, mask=inside), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + at, mask=inside)
    tl.store(out + row * size + at, (gate * tl.sigmoid(gate)).to(up.dtype) * up, mask=inside)


@triton.jit
def _linear_of_row(
    x, weight, bias, out, num_columns, depth, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = weight + tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None] * depth
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < depth
        part = tl.load(rows + at[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        total += part.to(tl.float32) * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(out + columns, result, mask=columns < num_columns)


@triton.jit
def _linear_of_rows(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    of_weight = weight + tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None] * depth
    of_x = x + tl.minimum(rows, num_rows - 1)[None, :] * depth
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(0, depth, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < depth
        part = tl.load(of_weight + at[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        factors = tl.load(of_x + at[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(part, factors, total)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[:, None]
    places = out + rows[None, :].to(tl.int64) * num_columns + columns[:, None]
    tl.store(places, total, mask=(rows < num_rows)[None, :] & (columns < num_columns)[:, None])


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
