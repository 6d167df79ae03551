"""Register tiles: the innermost loops of kernels on a CPU, written as LLVM vectors.

All functions here work on addresses and strides in bytes, are called from compiled code, and check nothing. The counts
that are called literal must be constants where the call is compiled; they set how many registers a tile takes.

LLVM allocates registers by its model of the CPU, not always well: a tile that fills them all is written in the order
that needs the fewest at once, an operand just before its products. With all operands loaded first, 4 x 3 sums became on
Zen 3 (16 registers) a loop that moved 18 vectors and kept some on the stack, and ran at 0.7 of its present speed.

Source: register blocking as in BLIS (Van Zee and van de Geijn, 2015).
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from numba import types
from numba.extending import intrinsic

from deployments.engine.kernels.cpu_vectors import FLOAT_BYTES, LANES, ZERO, Emitter

# Products of a float's smallest numbers take a hundred times as long as others: weights under 1e-26 are 0.
_LEAST_SCORE, _LEAST_GATE = -60.0, -86.0


@intrinsic(prefer_literal=True)
def matmul_tile(
    _, x, x_stride, weight, depth, ahead, ahead_stride, start, start_stride, out, out_stride, num_rows, num_vectors
):
    """Matrix product of a few rows and columns, added to what they start from.

    out[r, c] = start[r, c] + sum over k of x[r, k] * weight[k, c], for num_vectors * LANES columns; k in order.

    Args:
        x: address of (num_rows, depth).
        x_stride: bytes from row to row.
        weight: address of (depth, num_vectors * LANES), contiguous.
        depth: at least 1.
        ahead: address of what is read later; a line of it is prefetched per k. Need not be valid.
        ahead_stride: bytes from line to line.
        start: address of (num_rows, num_vectors * LANES).
        start_stride: bytes from row to row; 0: the same for all.
        out: address, may be `start`.
        out_stride: bytes from row to row.
        num_rows: literal.
        num_vectors: literal.
    """
    rows, vectors = range(num_rows.literal_value), range(num_vectors.literal_value)

    def generate(_context, builder, _signature, args):
        x, x_stride, weight, depth, ahead, ahead_stride, start, start_stride, out, out_stride, *_ = args
        emit = Emitter(builder)
        x_rows = [emit.at(x, r, x_stride) for r in rows]

        def step(k, totals):
            at = emit.at(weight, k, len(vectors) * LANES * FLOAT_BYTES)
            emit.prefetch(emit.at(ahead, k, ahead_stride))
            weights = [emit.load(at, v) for v in vectors]
            sums = []
            for r, row in enumerate(x_rows):
                factor = emit.load_everywhere(emit.at(row, k, FLOAT_BYTES))
                sums += [emit.add_product(totals[r * len(vectors) + v], factor, weights[v]) for v in vectors]
            return sums

        totals = emit.repeat(
            depth, [emit.load(emit.at(start, r, start_stride), v) for r in rows for v in vectors], step
        )
        for r in rows:
            row = emit.at(out, r, out_stride)
            for v in vectors:
                emit.store(totals[r * len(vectors) + v], row, v)

    return types.void(*[types.int64] * 10, num_rows, num_vectors), generate


@intrinsic(prefer_literal=True)
def dot_tile(_, queries, query_stride, keys, key_stride, num_vectors, ahead, out, out_stride, num_queries, num_keys):
    """Dot products of a few queries with a few keys.

    out[q, k] = sum of queries[q] * keys[k] over num_vectors * LANES floats.

    Args:
        queries: address of (num_queries, num_vectors * LANES).
        query_stride: bytes from row to row.
        keys: address of (num_keys, num_vectors * LANES).
        key_stride: bytes from row to row.
        num_vectors: at least 1.
        ahead: bytes from each vector of keys to what is read after these keys; it is prefetched. May be 0.
        out: address of (num_queries, num_keys).
        out_stride: bytes from row to row.
        num_queries: literal.
        num_keys: literal.
    """
    rows, columns = range(num_queries.literal_value), range(num_keys.literal_value)

    def generate(_context, builder, _signature, args):
        queries, query_stride, keys, key_stride, num_vectors, ahead, out, out_stride, *_ = args
        emit = Emitter(builder)
        query_rows = [emit.at(queries, q, query_stride) for q in rows]
        key_rows = [emit.at(keys, k, key_stride) for k in columns]

        def step(v, totals):
            some = [emit.load(emit.at(row, v, LANES * FLOAT_BYTES)) for row in query_rows]
            places = [emit.at(row, v, LANES * FLOAT_BYTES) for row in key_rows]
            others = [emit.load(place) for place in places]
            for place in places:
                emit.prefetch(builder.add(place, ahead))
            return [emit.add_product(totals[q * len(columns) + k], some[q], others[k]) for q in rows for k in columns]

        totals = emit.repeat(num_vectors, [ZERO] * (len(rows) * len(columns)), step)
        for q in rows:
            row = emit.at(out, q, out_stride)
            for k in columns:
                emit.store_sum(totals[q * len(columns) + k], emit.at(row, k, FLOAT_BYTES))

    return types.void(*[types.int64] * 8, num_queries, num_keys), generate


@intrinsic(prefer_literal=True)
def add_weighted_tile(
    _, weights, weight_stride, values, value_stride, count, ahead, out, out_stride, num_rows, num_vectors
):
    """Add weighted sums of the same rows to a few results.

    out[r] += sum over i < count of weights[r, i] * values[i], on num_vectors * LANES floats; i in order.

    Args:
        weights: address of (num_rows, count).
        weight_stride: bytes from row to row.
        values: address of (count, num_vectors * LANES).
        value_stride: bytes from row to row.
        count: at least 1.
        ahead: bytes from each vector of values to what is read after these values; it is prefetched. May be 0.
        out: address of (num_rows, num_vectors * LANES).
        out_stride: bytes from row to row.
        num_rows: literal.
        num_vectors: literal.
    """
    rows, vectors = range(num_rows.literal_value), range(num_vectors.literal_value)

    def generate(_context, builder, _signature, args):
        weights, weight_stride, values, value_stride, count, ahead, out, out_stride, *_ = args
        emit = Emitter(builder)
        weight_rows = [emit.at(weights, r, weight_stride) for r in rows]
        out_rows = [emit.at(out, r, out_stride) for r in rows]

        def step(i, totals):
            value = emit.at(values, i, value_stride)
            parts = [emit.load(value, v) for v in vectors]
            for v in vectors:
                emit.prefetch(emit.at(builder.add(value, ahead), v, LANES * FLOAT_BYTES))
            factors = [emit.load_everywhere(emit.at(row, i, FLOAT_BYTES)) for row in weight_rows]
            return [emit.add_product(totals[r * len(vectors) + v], factors[r], parts[v]) for r in rows for v in vectors]

        totals = emit.repeat(count, [emit.load(row, v) for row in out_rows for v in vectors], step)
        for r in rows:
            for v in vectors:
                emit.store(totals[r * len(vectors) + v], out_rows[r], v)

    return types.void(*[types.int64] * 8, num_rows, num_vectors), generate


@intrinsic(prefer_literal=True)
def peak_tile(_, values, stride, num_vectors, peaks, num_rows):
    """Raise each peak to the greatest of a row's num_vectors * LANES floats, none of which is NaN.

    Args:
        values: address of (num_rows, num_vectors * LANES).
        stride: bytes from row to row.
        num_vectors: at least 1.
        peaks: address of (num_rows,).
        num_rows: literal.
    """
    rows = range(num_rows.literal_value)

    def generate(_context, builder, _signature, args):
        values, stride, num_vectors, peaks, *_ = args
        emit = Emitter(builder)
        starts = [emit.at(values, r, stride) for r in rows]

        def step(v, greatest):
            found = [emit.load(emit.at(start, v, LANES * FLOAT_BYTES)) for start in starts]
            return [emit.greater(new, old) for new, old in zip(found, greatest, strict=True)]

        greatest = emit.repeat(num_vectors, [emit.load_everywhere(emit.at(peaks, r, FLOAT_BYTES)) for r in rows], step)
        for r in rows:
            emit.store_greatest(greatest[r], emit.at(peaks, r, FLOAT_BYTES))

    return types.void(*[types.int64] * 4, num_rows), generate


@intrinsic(prefer_literal=True)
def weigh_tile(_, values, stride, num_vectors, peaks, sums, num_rows):
    """Put exp(value - its row's peak) in the place of rows of num_vectors * LANES floats.

    Rows are independent of each other, so several at once hide how long each vector's arithmetic takes.

    Args:
        values: address of (num_rows, num_vectors * LANES).
        stride: bytes from row to row.
        num_vectors: at least 1.
        peaks: address of (num_rows,); no value is greater.
        sums: address of (num_rows,), filled with the sums of what was put.
        num_rows: literal.
    """
    rows = range(num_rows.literal_value)

    def generate(_context, builder, _signature, args):
        values, stride, num_vectors, peaks, sums, *_ = args
        emit = Emitter(builder)
        starts = [emit.at(values, r, stride) for r in rows]
        greatest = [emit.load_everywhere(emit.at(peaks, r, FLOAT_BYTES)) for r in rows]

        def step(v, totals):
            places = [emit.at(start, v, LANES * FLOAT_BYTES) for start in starts]
            below = [builder.fsub(emit.load(place), peak) for place, peak in zip(places, greatest, strict=True)]
            weights = emit.exp_of_negative(below, _LEAST_SCORE)
            for weight, place in zip(weights, places, strict=True):
                emit.store(weight, place)
            return [emit.add(total, weight) for total, weight in zip(totals, weights, strict=True)]

        totals = emit.repeat(num_vectors, [ZERO] * len(rows), step)
        for r in rows:
            emit.store_sum(totals[r], emit.at(sums, r, FLOAT_BYTES))

    return types.void(*[types.int64] * 5, num_rows), generate


@intrinsic
def silu_mul_tile(_, gate, up, out, num_vectors):
    """Fill out with silu(gate) * up, num_vectors * LANES floats of each; addresses. At least one vector."""

    def generate(_context, builder, _signature, args):
        gate, up, out, num_vectors = args
        emit = Emitter(builder)
        one = emit.in_all_lanes(1.0)

        def step(v, _totals):
            x, scaled, to = (emit.at(address, v, LANES * FLOAT_BYTES) for address in (gate, up, out))
            value = emit.load(x)
            (small,) = emit.exp_of_negative([emit.negative_of(value)], _LEAST_GATE)
            share = builder.select(builder.fcmp_ordered(">=", value, ZERO), one, small)
            share = builder.fdiv(share, builder.fadd(one, small))
            emit.store(builder.fmul(builder.fmul(value, share), emit.load(scaled)), to)
            return []

        emit.repeat(num_vectors, [], step)

    return types.void(*[types.int64] * 4), generate


@intrinsic
def rotate_tile(_, head, cos, sin, out, half, num_vectors):
    """Rotate num_vectors * LANES pairs of floats, whose second ones lie `half` bytes behind the first.

    Args:
        head: address.
        cos: address of one factor for each float, laid out as the head.
        sin: as cos.
        out: address, filled likewise; not the head's.
        half: bytes.
        num_vectors: at least 1.
    """

    def generate(_context, builder, _signature, args):
        *addresses, half, num_vectors = args
        emit = Emitter(builder)

        def step(v, _totals):
            firsts = [emit.at(address, v, LANES * FLOAT_BYTES) for address in addresses]
            seconds = [builder.add(first, half) for first in firsts]
            (a, cos_a, sin_a), (b, cos_b, sin_b) = (map(emit.load, places[:3]) for places in (firsts, seconds))
            emit.store(builder.fsub(builder.fmul(a, cos_a), builder.fmul(b, sin_a)), firsts[3])
            emit.store(emit.add_product(builder.fmul(b, cos_b), a, sin_b), seconds[3])
            return []

        emit.repeat(num_vectors, [], step)

    return types.void(*[types.int64] * 6), generate
