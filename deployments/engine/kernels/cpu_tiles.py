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


@intrinsic
def peak_tile(_, values, num_vectors):
    """The greatest of num_vectors * LANES floats, none of which is NaN.

    Args:
        values: address.
        num_vectors: at least 1.
    """

    def generate(_context, builder, _signature, args):
        values, num_vectors = args
        emit = Emitter(builder)

        def step(v, peaks):
            return [emit.greater(emit.load(emit.at(values, v, LANES * FLOAT_BYTES)), peaks[0])]

        return emit.greatest_of(*emit.repeat(num_vectors, [emit.load(values)], step))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def weigh_tile(_, values, num_vectors, peak):
    """Put exp(value - peak) in the place of num_vectors * LANES floats.

    Args:
        values: address.
        num_vectors: at least 1.
        peak: no value is greater.

    Returns:
        The sum of what was put.
    """

    def generate(_context, builder, _signature, args):
        values, num_vectors, peak = args
        emit = Emitter(builder)
        peaks = emit.in_all_lanes(peak)

        def step(v, totals):
            at = emit.at(values, v, LANES * FLOAT_BYTES)
            weights = emit.exp_of_negative(builder.fsub(emit.load(at), peaks))
            emit.store(weights, at)
            return [builder.fadd(totals[0], weights)]

        return emit.sum_of(*emit.repeat(num_vectors, [ZERO], step))

    return types.float32(types.int64, types.int64, types.float32), generate
