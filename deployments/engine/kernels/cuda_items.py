"""What a program of a decode attention does: walks along the keys of an item of the plan, in Triton."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from deployments.engine.kernels.cuda_scores import (
    codes_of_tile,
    empty_softmax,
    slots_of_tile,
    squash,
    unseen_out,
    weigh,
)


@triton.jit
def attend_item(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    begin,
    start,
    end,
    kv_head,
    num_kv_heads,
    scaling,
    softcap,
    position,
    window,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Keys of one head from `start` to `end`, but for those before `begin`: peak and total of the scores, and the sum.

    Rows see all of these keys, or, if `IS_CAUSAL`, those up to their positions and within their windows.
    """
    if key_scales is None:
        peak, total, result = _attend(
            query, keys, values, table, begin, start, end, kv_head, num_kv_heads, scaling, softcap, position, window,
            HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP, IS_CAUSAL,
        )  # fmt: skip
    else:
        peak, total, result = _attend_codes(
            query, keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM, key_scales + kv_head * BLOCK_SIZE,
            value_scales + kv_head * BLOCK_SIZE, table, begin, start, end, num_kv_heads * HEAD_DIM, scaling, softcap,
            position, window, HEAD_DIM, DIMS, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP, IS_CAUSAL,
        )  # fmt: skip
    return peak, total, result


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
    position,
    window,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Tiles from `start` to `end`; see `attend_item`."""
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
        if IS_CAUSAL:
            scores = unseen_out(scores, position, first + tokens, window, HAS_WINDOW)
        else:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        peak, total, weights, shrink = weigh(scores, peak, total, MAY_SEE_NOTHING=IS_CAUSAL)
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
    position,
    window,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """As `_attend`, of codes, which become float16: it holds them all, and a GPU has instructions for that alone.

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
        if IS_CAUSAL:
            scores = unseen_out(scores, position, first + tokens, window, HAS_WINDOW)
        else:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        peak, total, weights, shrink = weigh(scores, peak, total, MAY_SEE_NOTHING=IS_CAUSAL)
        value = tl.load(values + at, mask=loaded, other=0.0)
        of_value = tl.load(value_scales + scale, mask=inside, other=0.0)
        highest = tl.maximum(tl.max(of_value, axis=0), 7.888609052210118e-31)
        weights = (weights * (of_value / highest)[None, :]).to(tl.float16)
        result = result * shrink[:, None] + tl.dot(weights, value.to(tl.float16)) * highest
    return peak, total, result
