"""Keys and values in FP8 on a GPU, in Triton: rounded as they enter the pool, widened as they are copied out of it.

What is rounded here is what `fp8_kv.py` rounds, bit for bit.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV, Rotation
from deployments.engine.kernels.cuda_overlap import wait_for_earlier
from deployments.engine.kernels.cuda_rotary import (
    heads_of_part,
    launch_parts,
    load_pairs,
    load_rest,
    store_heads,
    with_contiguous_heads,
)


def rotate_and_round(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Rotation | None,
    kv: PagedKV,
    slots: Tensor,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `rotate_and_write`, into a pool in FP8.

    Args:
        queries: (T, H, head_dim); fastest where heads are contiguous and tokens at equal distances.
        keys: (T, H_kv, head_dim), as the queries.
        values: as the keys.
        rotation: of queries and keys, and their norms; None: they stay as they are.
        kv: codes and scales of one layer.
        slots: (T,) int32 or int64; tokens with a negative slot are padding and are not written.
        keep: give keys and values as they are read from now on back as well.

    Returns:
        The rotated queries, (T, H, head_dim), contiguous; with `keep` the rotated and rounded keys, and the rounded
        values, (T, H_kv, head_dim), else None, and the values as they were.
    """
    queries, keys, values = (with_contiguous_heads(part) for part in (queries, keys, values))
    out = queries.contiguous() if rotation is None else queries.new_empty(queries.shape)
    kept = [part.new_empty(part.shape) if keep else None for part in (keys, values)]
    constants = {"BLOCK_SIZE": kv.keys.shape[1]}
    launch_parts(_rotate_and_round, queries, keys, values, rotation, kv, slots, [out, *kept], constants)
    new_keys, new_values = kept
    return out, new_keys, values if new_values is None else new_values


def widen_blocks(codes: Tensor, scales: Tensor, block_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of some blocks of keys or values.

    Args:
        codes: (num_blocks, block_size, H_kv, head_dim) float8_e4m3fn, each block contiguous.
        scales: (num_blocks, H_kv, block_size) float32, likewise.
        block_ids: (N,) integer.
        dtype: of the result.

    Returns:
        (N, block_size, H_kv, head_dim).
    """
    block_size, num_kv_heads, head_dim = codes.shape[1:]
    out = torch.empty((len(block_ids), *codes.shape[1:]), dtype=dtype, device=codes.device)
    dims = triton.next_power_of_2(head_dim)
    rows = max(1, 4096 // dims)
    _widen_blocks[(triton.cdiv(block_size * num_kv_heads, rows), len(block_ids))](
        codes,
        scales,
        block_ids,
        out,
        codes.stride(0),
        scales.stride(0),
        num_kv_heads,
        ROWS=rows,
        HEAD_DIM=head_dim,
        DIMS=dims,
        BLOCK_SIZE=block_size,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize_on_alignment=["slots"])  # see `_rotate_and_write`
def _rotate_and_round(
    queries,
    keys,
    values,
    cos,
    sin,
    key_codes,
    value_codes,
    key_scales,
    value_scales,
    slots,
    out,
    new_keys,
    new_values,
    query_norm,
    key_norm,
    eps,
    query_stride,
    key_stride,
    value_stride,
    cos_stride,
    num_heads,
    num_kv_heads,
    query_parts,
    kv_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """As `_rotate_and_write`, keys and values rounded."""
    wait_for_earlier(OVERLAPS)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source, heads, inside = heads_of_part(
        part, token, queries, keys, values, query_stride, key_stride, value_stride,
        num_heads, num_kv_heads, query_parts, kv_parts, HEADS, HEAD_DIM,
    )  # fmt: skip
    is_key = (part >= query_parts) & (part < query_parts + kv_parts)
    a, b, rest = None, None, None
    if ROTATED > 0:
        a, b = load_pairs(
            source, inside, cos + token * cos_stride, sin + token * cos_stride, query_norm, key_norm, eps,
            part, query_parts, kv_parts, ROTATED, HALF, HEAD_DIM,
        )  # fmt: skip
    if ROTATED < HEAD_DIM:
        rest = load_rest(source, inside, ROTATED, REST, HEAD_DIM)
    if part < query_parts:
        store_heads(out + (token * num_heads + heads) * HEAD_DIM, a, b, rest, inside, ROTATED, HALF, REST, HEAD_DIM)
    else:
        _round_heads(
            a, b, rest, token, heads, inside, is_key, slots,
            key_codes, value_codes, key_scales, value_scales, new_keys, new_values, num_kv_heads,
            HEADS, HEAD_DIM, ROTATED, HALF, REST, BLOCK_SIZE, KEEP,
        )  # fmt: skip


@triton.jit
def _round_heads(
    a,
    b,
    rest,
    token,
    heads,
    inside,
    is_key,
    slots,
    key_codes,
    value_codes,
    key_scales,
    value_scales,
    new_keys,
    new_values,
    num_kv_heads,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Round heads of keys or values of one token, each by its largest number; store codes and scales."""
    # See `round_heads`; 0.00223... = 1 / 448.
    largest = _largest(a, b, rest, HEADS, ROTATED, HEAD_DIM)
    scale = tl.maximum(largest * 0.002232142857142857, 7.888609052210118e-31)[:, None]
    slot = tl.load(slots + token).to(tl.int64)
    block, inner = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    block_bytes = BLOCK_SIZE * num_kv_heads * (HEAD_DIM + 4)
    codes, scales, kept = value_codes, value_scales, new_values
    if is_key:
        codes, scales = key_codes, key_scales
        if KEEP:
            kept = new_keys
    if KEEP:
        kept += (token * num_kv_heads + heads) * HEAD_DIM
    place = codes + block * block_bytes + (inner * num_kv_heads + heads) * HEAD_DIM
    written = inside & (slot >= 0)
    tl.store(scales + block * (block_bytes // 4) + heads * BLOCK_SIZE + inner, scale, mask=written)
    if ROTATED > 0:
        j = tl.arange(0, HALF)[None, :]
        low = j < ROTATED // 2
        _store_rounded(a, scale, place, kept, j, inside & low, written & low, KEEP)
        _store_rounded(b, scale, place, kept, ROTATED // 2 + j, inside & low, written & low, KEEP)
    if ROTATED < HEAD_DIM:
        j = ROTATED + tl.arange(0, REST)[None, :]
        _store_rounded(rest, scale, place, kept, j, inside & (j < HEAD_DIM), written & (j < HEAD_DIM), KEEP)


@triton.jit
def _largest(a, b, rest, HEADS: tl.constexpr, ROTATED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The largest magnitude of each head; (HEADS,) float32."""
    largest = tl.zeros((HEADS,), tl.float32)
    if ROTATED > 0:
        largest = tl.max(tl.maximum(tl.abs(a.to(tl.float32)), tl.abs(b.to(tl.float32))), axis=1)
    if ROTATED < HEAD_DIM:
        largest = tl.maximum(largest, tl.max(tl.abs(rest.to(tl.float32)), axis=1))
    return largest


@triton.jit
def _store_rounded(value, scale, place, kept, at, inside, written, KEEP: tl.constexpr):
    codes = tl.div_rn(value.to(tl.float32), scale).to(place.dtype.element_ty)
    tl.store(place + at, codes, mask=written)
    if KEEP:
        tl.store(kept + at, (codes.to(tl.float32) * scale).to(value.dtype), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["block_ids"])  # behind a window they begin amid a table
def _widen_blocks(
    codes,
    scales,
    block_ids,
    out,
    code_stride,
    scale_stride,
    num_kv_heads,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Some rows of one block: heads of tokens, in the order of their codes."""
    row, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIMS)
    number = tl.program_id(1).to(tl.int64)
    block = tl.load(block_ids + number).to(tl.int64)
    num_rows = BLOCK_SIZE * num_kv_heads
    inside = row < num_rows
    kept = inside[:, None] & (dims < HEAD_DIM)[None, :]
    at = row[:, None] * HEAD_DIM + dims[None, :]
    code = tl.load(codes + block * code_stride + at, mask=kept, other=0.0)
    place = row % num_kv_heads * BLOCK_SIZE + row // num_kv_heads
    scale = tl.load(scales + block * scale_stride + place, mask=inside, other=0.0)
    tl.store(out + number * num_rows * HEAD_DIM + at, code.to(tl.float32) * scale[:, None], mask=kept)
