"""Attention of a prompt's chunk over a paged pool; float32 on a CPU. Its own keys are in the pool like those before it.

Keys and values of some blocks are copied together in the order in which register tiles read them, and serve all
queries. A task takes some tokens' queries of one KV head, all heads of the group as rows, and goes through the keys
with a running softmax, so that scores stay in the second-level cache.

Keys come in portions that begin at fixed positions, and each query goes through them in order. So its result does not
depend on where its chunk begins and ends.

Source: FlashAttention-2 (Dao, 2023); PagedAttention (Kwon et al., SOSP 2023).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

import numpy as np

from deployments.engine.compiled import njit, prange
from deployments.engine.kernels.cpu import PARALLEL, exp_of_negative
from deployments.engine.kernels.cpu_tiles import matmul_tile, peak_tile, weigh_tile
from deployments.engine.kernels.cpu_vectors import LANES, NUM_REGISTERS

_FLOAT = np.float32
# Scores: a tile's rows and vectors of keys, as in the packed product.
_KEY_VECTORS = 3
_SCORE_ROWS = 8 if NUM_REGISTERS == 32 else 4
_KEYS = _KEY_VECTORS * LANES  # of a panel
_PANELS = 4 if LANES == 16 else 8  # of a portion
PORTION = _PANELS * _KEYS  # 192 keys: with 64 dimensions 48 KiB, and as much of values
# Sums of values: heads are mostly 64 or 128 wide, which 3 vectors do not divide.
_VALUE_VECTORS = 2
_VALUE_ROWS = 12 if NUM_REGISTERS == 32 else 6
_VALUE_LANES = _VALUE_VECTORS * LANES
_WEIGHED_ROWS = 4 if NUM_REGISTERS == 32 else 2
_TOKENS = 32  # whose queries one task takes
_NOTHING = _FLOAT(-3e38)  # not -inf, of which fastmath may assume that there is none
_PORTIONS_AT_ONCE = 16  # copied together, so that scratch memory does not grow with the context


@njit(parallel=PARALLEL, cache=PARALLEL, nogil=True)
def prompt_attention(queries, keys, values, table, context_len, window, scaling, out):
    """Attend causally.

    Args:
        queries: (T, H, head_dim), of the tokens at context_len and behind it.
        keys: (num_blocks, block_size, H_kv, head_dim), contiguous; the T tokens' own are there.
        values: as the keys.
        table: (B,) int64 block ids of the sequence.
        context_len: tokens before the first query.
        window: a token sees itself and this many less one before it.
        scaling: of the scores.
        out: (T, H, head_dim), filled.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    end = context_len + num_tokens
    begin = max(0, context_len - window + 1) // PORTION
    last = (end + PORTION - 1) // PORTION
    num_tasks = (num_tokens + _TOKENS - 1) // _TOKENS
    width = (head_dim + _VALUE_LANES - 1) // _VALUE_LANES * _VALUE_LANES
    rows = num_tokens * (num_heads // num_kv_heads)  # of a KV head
    totals = np.empty((num_kv_heads, rows, width), _FLOAT)
    peaks, sums = np.empty((num_kv_heads, rows), _FLOAT), np.empty((num_kv_heads, rows), _FLOAT)
    at_once = min(_PORTIONS_AT_ONCE, last - begin)
    key_panels = np.empty((num_kv_heads, at_once, _PANELS, head_dim, _KEYS), _FLOAT)
    value_panels = np.empty((num_kv_heads, at_once, width // _VALUE_LANES, PORTION, _VALUE_LANES), _FLOAT)
    for first in range(begin, last, _PORTIONS_AT_ONCE):
        count = min(_PORTIONS_AT_ONCE, last - first)
        for i in prange(num_kv_heads * count):
            head, portion = np.int64(i) // count, np.int64(i) % count
            start = (first + portion) * PORTION
            _copy_keys(keys, table, head, start, end, key_panels[head, portion])
            _copy_values(values, table, head, start, end, value_panels[head, portion])
        for i in prange(num_kv_heads * num_tasks):
            head, place = np.int64(i) // num_tasks, np.int64(i) % num_tasks
            # Early tokens see few keys, late ones many: threads take stretches of i, so each gets both.
            task = place // 2 if place % 2 == 0 else num_tasks - 1 - place // 2
            token = task * _TOKENS
            span = slice(token, min(token + _TOKENS, num_tokens))
            group = num_heads // num_kv_heads
            heads, its_rows = slice(head * group, (head + 1) * group), slice(span.start * group, span.stop * group)
            _attend(
                queries[span, heads],
                key_panels[head],
                value_panels[head],
                first,
                count,
                first == begin,
                first + count == last,
                context_len + token,
                window,
                scaling,
                totals[head, its_rows],
                peaks[head, its_rows],
                sums[head, its_rows],
                out[span, heads],
            )


@njit(inline="never")
def _copy_keys(keys, table, head, start, end, panels):
    """Keys [start, end) of a portion, a column each; zeros behind them."""
    size, head_dim = keys.shape[1], keys.shape[3]
    for p in range(panels.shape[0]):
        panel = panels[p]
        for j in range(_KEYS):
            at = start + p * _KEYS + j
            if at < end:
                key = keys[table[at // size], at % size, head]
                for d in range(head_dim):
                    panel[d, j] = key[d]
            else:
                for d in range(head_dim):
                    panel[d, j] = _FLOAT(0)


@njit(inline="never")
def _copy_values(values, table, head, start, end, panels):
    """Values [start, end) of a portion, a row each, in stretches of `_VALUE_LANES`; zeros around them."""
    size, head_dim = values.shape[1], values.shape[3]
    for p in range(panels.shape[0]):
        panel, offset = panels[p], p * _VALUE_LANES
        filled = min(_VALUE_LANES, head_dim - offset)
        for j in range(PORTION):
            at = start + j
            row = panel[j]
            if at < end:
                value = values[table[at // size], at % size, head]
                for d in range(filled):
                    row[d] = value[offset + d]
                for d in range(filled, _VALUE_LANES):
                    row[d] = _FLOAT(0)
            else:
                row[:] = _FLOAT(0)


@njit(fastmath=True, inline="never")
def _attend(
    queries,
    key_panels,
    value_panels,
    first,
    count,
    is_first,
    is_last,
    position,
    window,
    scaling,
    totals,
    peaks,
    sums,
    out,
):
    """Take some portions into the running softmax of one group's queries of some tokens.

    Args:
        queries: (T, group, head_dim), the first token at `position`.
        key_panels: (at least count, ...) of the head, from portion `first` on.
        value_panels: as the keys'.
        first: number of the first portion.
        count: of portions.
        is_first: nothing was taken in before.
        is_last: nothing follows: out is filled.
        position: of the first token.
        window: as above.
        scaling: of the scores.
        totals: (T * group, width): weighted sums of values, relative to the peaks.
        peaks: (T * group,): the greatest score so far.
        sums: (T * group,): of the weights.
        out: (T, group, head_dim).
    """
    num_tokens, group = queries.shape[:2]
    rows = _scale(queries, scaling)
    if is_first:
        totals[:] = _FLOAT(0)
        sums[:] = _FLOAT(0)
        peaks[:] = _NOTHING
    scores, zeros = np.empty((num_tokens * group, PORTION), _FLOAT), np.zeros(_KEYS, _FLOAT)
    for portion in range(count):
        start = (first + portion) * PORTION
        if start >= position + num_tokens or start + PORTION <= position - window + 1:
            continue
        _score(rows, group, key_panels[portion], start, position, zeros, scores)
        _weigh(scores, group, start, position, window, totals, peaks, sums)
        _accumulate(scores, group, value_panels[portion], start, position, totals)
    if is_last:
        _normalise(totals, sums, out)


@njit(fastmath=True, inline="never")
def _scale(queries, scaling):
    """Queries (T, group, head_dim) as rows (T * group, head_dim), scaled."""
    num_tokens, group, head_dim = queries.shape
    rows = np.empty((num_tokens * group, head_dim), _FLOAT)
    for t in range(num_tokens):
        for g in range(group):
            row, query = rows[t * group + g], queries[t, g]
            for d in range(head_dim):
                row[d] = query[d] * scaling
    return rows


@njit(fastmath=True, inline="never")
def _normalise(totals, sums, out):
    """Fill out (T, group, head_dim) with the totals (T * group, width), divided by the sums of their weights."""
    num_tokens, group, head_dim = out.shape
    for t in range(num_tokens):
        for g in range(group):
            total, result, share = totals[t * group + g], out[t, g], _FLOAT(1) / sums[t * group + g]
            for d in range(head_dim):
                result[d] = total[d] * share


@njit(fastmath=True, inline="never")
def _weigh(scores, group, start, position, window, totals, peaks, sums):
    """From the scores (R, PORTION) of keys that are seen to weights, of all others to none.

    What was summed is put on the weights' scale. Rows that lie before the portion are left as they are.
    """
    num_rows, num_tokens = scores.shape[0], scores.shape[0] // group
    stride, scores_at, peaks_at = 4 * PORTION, np.int64(scores.ctypes.data), np.int64(peaks.ctypes.data)
    end = min(PORTION, position + num_tokens - start)  # what is behind it is not read
    row, stop = max(0, start - position) * group, min(num_tokens, start + PORTION + window - 1 - position) * group
    for r in range(stop, num_rows):
        for j in range(end):
            scores[r, j] = _FLOAT(0)
    before, weights = np.empty(_WEIGHED_ROWS, _FLOAT), np.empty(_WEIGHED_ROWS, _FLOAT)
    weights_at = np.int64(weights.ctypes.data)
    while row < stop:
        count = _WEIGHED_ROWS if stop - row >= _WEIGHED_ROWS else 1
        # Places of the first and the last row's token among the portion's, and the vectors that hold what any row sees.
        place, last_place = position + row // group - start, position + (row + count - 1) // group - start
        first = max(0, place - window + 1) // LANES * LANES
        last = min(PORTION, last_place + LANES) // LANES * LANES
        if last_place >= window or place + 1 < max(last, end):  # a row sees not all
            for r in range(row, row + count):
                _hide(scores[r], position + r // group - start, window, first, last, end)
        for r in range(count):
            before[r] = peaks[row + r]
        at, peak_at, num_vectors = scores_at + row * stride + 4 * first, peaks_at + 4 * row, (last - first) // LANES
        if count == _WEIGHED_ROWS:
            peak_tile(at, stride, num_vectors, peak_at, _WEIGHED_ROWS)
            weigh_tile(at, stride, num_vectors, peak_at, weights_at, _WEIGHED_ROWS)
        else:
            peak_tile(at, stride, num_vectors, peak_at, 1)
            weigh_tile(at, stride, num_vectors, peak_at, weights_at, 1)
        for r in range(count):
            if before[r] != peaks[row + r]:
                scale, total = exp_of_negative(before[r] - peaks[row + r]), totals[row + r]
                for d in range(total.shape[0]):
                    total[d] *= scale
                sums[row + r] *= scale
            sums[row + r] += weights[r]
        row += count


@njit(inline="never")
def _hide(scores, place, window, first, last, end):
    """Of one row: the scores that are not seen, to `_NOTHING` in [first, last), and to 0 before and behind it.

    `place`: of the row's token among the portion's.
    """
    for j in range(first):
        scores[j] = _FLOAT(0)
    for j in range(first, min(last, place - window + 1)):
        scores[j] = _NOTHING
    for j in range(max(first, place + 1), last):
        scores[j] = _NOTHING
    for j in range(last, end):
        scores[j] = _FLOAT(0)


@njit(inline="never")
def _score(rows, group, panels, start, position, zeros, scores):
    """Fill scores (R, PORTION), but for panels that lie behind all that a tile's rows see; `zeros`: (_KEYS,)."""
    num_rows, head_dim = rows.shape
    stride, to_stride = 4 * head_dim, 4 * PORTION
    rows_at, scores_at = np.int64(rows.ctypes.data), np.int64(scores.ctypes.data)
    zeros_at = np.int64(zeros.ctypes.data)
    for p in range(_PANELS):
        panel = np.int64(panels[p].ctypes.data)
        # The first row that sees a key of the panel.
        row = max(0, start + p * _KEYS - position) * group
        while row < num_rows:
            left = num_rows - row
            x, to = rows_at + row * stride, scores_at + row * to_stride + p * 4 * _KEYS
            if left >= _SCORE_ROWS:
                matmul_tile(x, stride, panel, head_dim, panel, 0, zeros_at, 0, to, to_stride, _SCORE_ROWS, _KEY_VECTORS)
                row += _SCORE_ROWS
            else:
                matmul_tile(x, stride, panel, head_dim, panel, 0, zeros_at, 0, to, to_stride, 1, _KEY_VECTORS)
                row += 1


@njit(inline="never")
def _accumulate(weights, group, panels, start, position, totals):
    """Add values, weighted, to totals (R, width); as many as a tile's rows see."""
    num_rows, width = totals.shape
    stride, to_stride = 4 * PORTION, 4 * width
    weights_at, totals_at = np.int64(weights.ctypes.data), np.int64(totals.ctypes.data)
    for p in range(panels.shape[0]):
        panel = np.int64(panels[p].ctypes.data)
        row = max(0, start - position) * group
        while row < num_rows:
            left = num_rows - row
            count = _VALUE_ROWS if left >= _VALUE_ROWS else 4 if left >= 4 else 1
            seen = min(PORTION, position + (row + count - 1) // group + 1 - start)
            x, to = weights_at + row * stride, totals_at + row * to_stride + p * 4 * _VALUE_LANES
            if count == _VALUE_ROWS:
                matmul_tile(x, stride, panel, seen, panel, 0, to, to_stride, to, to_stride, _VALUE_ROWS, _VALUE_VECTORS)
            elif count == 4:
                matmul_tile(x, stride, panel, seen, panel, 0, to, to_stride, to, to_stride, 4, _VALUE_VECTORS)
            else:
                matmul_tile(x, stride, panel, seen, panel, 0, to, to_stride, to, to_stride, 1, _VALUE_VECTORS)
            row += count
