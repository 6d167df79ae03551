"""What comes before attention on a GPU, in Triton: norms of heads, the rotary embedding, writing KV into the pool."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.arguments import Rotation
from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier


def rotate_and_write(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Rotation | None,
    key_pool: Tensor,
    value_pool: Tensor,
    slots: Tensor,
    *,
    keep_keys: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of queries and keys; keys and values go into the paged pool.

    Args:
        queries: (T, H, head_dim); fastest where heads are contiguous and tokens at equal distances.
        keys: (T, H_kv, head_dim), as the queries.
        values: as the keys.
        rotation: of queries and keys, and their norms; None: they stay as they are.
        key_pool: (num_slots, H_kv, head_dim), contiguous; of one layer.
        value_pool: as the key pool.
        slots: (T,) int32 or int64; tokens with a negative slot are padding and are not written.
        keep_keys: give the rotated keys back as well.

    Returns:
        The rotated queries, (T, H, head_dim), contiguous, and the rotated keys, (T, H_kv, head_dim), or None.
    """
    queries, keys, values = (with_contiguous_heads(part) for part in (queries, keys, values))
    out = queries.contiguous() if rotation is None else queries.new_empty(queries.shape)
    new_keys = keys.new_empty(keys.shape) if keep_keys and rotation is not None else None
    launch_parts(_rotate_and_write, queries, keys, values, rotation, [key_pool, value_pool], slots, [out, new_keys], {})
    return out, keys if rotation is None else new_keys


def with_contiguous_heads(part: Tensor) -> Tensor:
    return part if part.stride()[1:] == (part.shape[2], 1) else part.contiguous()


def launch_parts(
    kernel: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Rotation | None,
    pools: Sequence[Tensor | None],
    slots: Tensor,
    results: Sequence[Tensor | None],
    constants: Mapping[str, int],
) -> None:
    """Run a kernel for each token and each part of its heads: of queries, if they are rotated, of keys and of values.

    Args:
        kernel: as `_rotate_and_write`, but for its pools, results and constants.
        queries: as `rotate_and_write` has them, heads contiguous; keys and values too.
        pools: what is written at `slots`.
        results: what else is written: the queries, then what is kept of keys and values.
        constants: what else the kernel has to know of its pools.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    heads = min(8, triton.next_power_of_2(max(num_heads, num_kv_heads)))
    query_parts = 0 if rotation is None else triton.cdiv(num_heads, heads)
    kv_parts = triton.cdiv(num_kv_heads, heads)
    cos, sin, num_dims, norms = (None, None, 0, None) if rotation is None else rotation
    assert norms is None or num_dims == head_dim, "norms are of whole heads"
    if cos is not None and sin is not None:
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
    kernel[(num_tokens, query_parts + 2 * kv_parts)](
        queries,
        keys,
        values,
        cos,
        sin,
        *pools,
        slots,
        *results,
        *(norms or (None, None, 0.0)),
        queries.stride(0),
        keys.stride(0),
        values.stride(0),
        0 if cos is None else cos.stride(0),
        num_heads,
        num_kv_heads,
        query_parts,
        kv_parts,
        HEADS=heads,
        HEAD_DIM=head_dim,
        ROTATED=num_dims,
        HALF=triton.next_power_of_2(max(1, num_dims // 2)),
        REST=triton.next_power_of_2(max(1, head_dim - num_dims)),
        KEEP=results[-1] is not None,
        **constants,
        num_warps=4 if heads * head_dim >= 512 else 1,
        **OVERLAPPING,
    )


@triton.jit
def _scaled(value, weight, inside, dtype: tl.constexpr):
    """What has been normalised, scaled and rounded; as `rms_norm` does it."""
    factor = tl.load(weight, mask=inside, other=0.0)
    if weight.dtype.element_ty == tl.float32:
        return (value * factor).to(dtype).to(tl.float32)
    return (value.to(dtype) * factor).to(tl.float32)


# Slots of a group of layers lie behind those of others, at any place.
@triton.jit(do_not_specialize_on_alignment=["slots"])
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
    KEEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One token and some heads: of the queries, then of the keys, then of the values."""
    wait_for_earlier(OVERLAPS)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source, heads, inside = heads_of_part(
        part, token, queries, keys, values, query_stride, key_stride, value_stride,
        num_heads, num_kv_heads, query_parts, kv_parts, HEADS, HEAD_DIM,
    )  # fmt: skip
    target, written = _place_of_part(
        part, token, heads, inside, tl.load(slots + token).to(tl.int64), key_pool, value_pool, out,
        num_heads, num_kv_heads, query_parts, kv_parts, HEAD_DIM,
    )  # fmt: skip
    a, b, rest = None, None, None
    if ROTATED > 0:
        a, b = load_pairs(
            source, inside, cos + token * cos_stride, sin + token * cos_stride, query_norm, key_norm, eps,
            part, query_parts, kv_parts, ROTATED, HALF, HEAD_DIM,
        )  # fmt: skip
    if ROTATED < HEAD_DIM:
        rest = load_rest(source, inside, ROTATED, REST, HEAD_DIM)
    if KEEP:  # noqa: SIM102  # Triton decides this one when it compiles, the next one on the GPU
        if (part >= query_parts) & (part < query_parts + kv_parts):
            kept = new_keys + (token * num_kv_heads + heads) * HEAD_DIM
            store_heads(kept, a, b, rest, inside, ROTATED, HALF, REST, HEAD_DIM)
    store_heads(target, a, b, rest, written, ROTATED, HALF, REST, HEAD_DIM)


@triton.jit
def heads_of_part(
    part,
    token,
    queries,
    keys,
    values,
    query_stride,
    key_stride,
    value_stride,
    num_heads,
    num_kv_heads,
    query_parts,
    kv_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Where a part's heads are read, which they are, and which of them exist; (HEADS, 1) each."""
    if part < query_parts:
        heads = (part * HEADS + tl.arange(0, HEADS))[:, None]
        source, inside = queries + token * query_stride, heads < num_heads
    elif part < query_parts + kv_parts:
        heads = ((part - query_parts) * HEADS + tl.arange(0, HEADS))[:, None]
        source, inside = keys + token * key_stride, heads < num_kv_heads
    else:
        heads = ((part - query_parts - kv_parts) * HEADS + tl.arange(0, HEADS))[:, None]
        source, inside = values + token * value_stride, heads < num_kv_heads
    source += heads * HEAD_DIM
    return source, heads, inside


@triton.jit
def _place_of_part(
    part,
    token,
    heads,
    inside,
    slot,
    key_pool,
    value_pool,
    out,
    num_heads,
    num_kv_heads,
    query_parts,
    kv_parts,
    HEAD_DIM: tl.constexpr,
):
    """Where a part's heads are written, and which of them: keys and values only of tokens that have a slot."""
    if part < query_parts:
        target = out + (token * num_heads + heads) * HEAD_DIM
    elif part < query_parts + kv_parts:
        target = key_pool + (slot * num_kv_heads + heads) * HEAD_DIM
    else:
        target = value_pool + (slot * num_kv_heads + heads) * HEAD_DIM
    return target, inside & ((part < query_parts) | (slot >= 0))


@triton.jit
def load_pairs(
    source,
    inside,
    cos,
    sin,
    query_norm,
    key_norm,
    eps,
    part,
    query_parts,
    kv_parts,
    ROTATED: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """What the rotary embedding is for of a part's heads, in halves; rotated, but for values."""
    j = tl.arange(0, HALF)[None, :]
    low = j < ROTATED // 2
    a = tl.load(source + j, mask=inside & low, other=0.0)
    b = tl.load(source + ROTATED // 2 + j, mask=inside & low, other=0.0)
    if part < query_parts + kv_parts:
        a, b = rotated(a, b, cos, sin, j, low, query_norm, key_norm, eps, part < query_parts, ROTATED, HEAD_DIM)
    return a, b


@triton.jit
def load_rest(source, inside, ROTATED: tl.constexpr, REST: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What the rotary embedding leaves of heads as it is."""
    j = ROTATED + tl.arange(0, REST)[None, :]
    return tl.load(source + j, mask=inside & (j < HEAD_DIM), other=0.0)


@triton.jit
def store_heads(
    target,
    a,
    b,
    rest,
    written,
    ROTATED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store what `load_pairs` and `load_rest` have loaded, of the heads that are written."""
    if ROTATED > 0:
        j = tl.arange(0, HALF)[None, :]
        tl.store(target + j, a, mask=written & (j < ROTATED // 2))
        tl.store(target + ROTATED // 2 + j, b, mask=written & (j < ROTATED // 2))
    if ROTATED < HEAD_DIM:
        j = ROTATED + tl.arange(0, REST)[None, :]
        tl.store(target + j, rest, mask=written & (j < HEAD_DIM))


@triton.jit
def rotated(
    a,
    b,
    cos,
    sin,
    j,
    low,
    query_norm,
    key_norm,
    eps,
    is_query,
    ROTATED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The first and the second halves `a` and `b` of heads, their elements `j`: normalised and rotated."""
    c = tl.load(cos + j, mask=low, other=0.0).to(tl.float32)
    s = tl.load(sin + j, mask=low, other=0.0).to(tl.float32)
    first, second = a.to(tl.float32), b.to(tl.float32)
    if query_norm is not None:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight = query_norm if is_query else key_norm
        first = _scaled(first * scale, weight + j, low, a.dtype)
        second = _scaled(second * scale, weight + ROTATED // 2 + j, low, a.dtype)
    return (first * c - second * s).to(a.dtype), (second * c + first * s).to(b.dtype)
