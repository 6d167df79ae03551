"""Register tiles: the innermost loops of kernels on a CPU, written as LLVM vectors.

LLVM does not turn numba's loops into these: it reloads and stores accumulators that fit in registers, and sums each dot
product by itself. All functions here work on addresses and strides in bytes, are called from compiled code, and check
nothing. The counts that are called literal must be constants where the call is compiled; they set how many registers a
tile takes. numba's cache on disk does not see changes of this file: remove `__pycache__` after one.

LLVM allocates registers by its model of the CPU, not always well: a tile that fills them all is written in the order
that needs the fewest at once, an operand just before its products. With all operands loaded first, 4 x 3 sums became on
Zen 3 (16 registers) a loop that moved 18 vectors and kept some on the stack, and ran at 0.7 of its present speed.

Source: register blocking as in BLIS (Van Zee and van de Geijn, 2015).
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

_CHOSEN = config.CPU_FEATURES  # type: ignore[attr-defined]  # what numba compiles for; None: for this CPU
_FEATURES = llvm.get_host_cpu_features().flatten() if _CHOSEN is None else _CHOSEN
# Floats of a vector, and vectors that fit in registers. Where registers are shorter LLVM splits a vector: ARM's 32 of 4
# floats hold as many as 16 of 8.
LANES, NUM_REGISTERS = (16, 32) if "+avx512f" in _FEATURES else (8, 16)

_FLOAT_BYTES = 4
_FLOAT = ir.FloatType()
_INT = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)
_UNDEFINED = ir.Constant(_VECTOR, ir.Undefined)
_FIRST = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
# Of Cephes' expf, the highest power first; 1 + x follow.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_FUSED = ("contract",)  # a product and its sum may become one instruction; the order of the sums stays


class _Emitter:
    """Writes vector code at an LLVM builder's place."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def at(self, address: Any, index: Any, stride: Any) -> Any:
        """Address of an element: a plain number costs nothing at run time."""
        index, stride = (ir.Constant(_INT, x) if isinstance(x, int) else x for x in (index, stride))
        return self._builder.add(address, self._builder.mul(index, stride))

    def load(self, address: Any, vector: int = 0) -> Any:
        """The n-th vector from an address on."""
        return self._builder.load(self._pointer(address, vector), align=_FLOAT_BYTES)

    def store(self, value: Any, address: Any, vector: int = 0) -> None:
        self._builder.store(value, self._pointer(address, vector), align=_FLOAT_BYTES)

    def load_everywhere(self, address: Any) -> Any:
        """One float in all lanes."""
        return self.in_all_lanes(
            self._builder.load(self._builder.inttoptr(address, _FLOAT.as_pointer()), align=_FLOAT_BYTES)
        )

    def in_all_lanes(self, value: Any) -> Any:
        """A float, or a plain number, in all lanes."""
        if isinstance(value, float):
            return ir.Constant(_VECTOR, [value] * LANES)
        vector = self._builder.insert_element(_UNDEFINED, value, ir.Constant(ir.IntType(32), 0))
        return self._builder.shuffle_vector(vector, _UNDEFINED, _FIRST)

    def greater(self, a: Any, b: Any) -> Any:
        """In each lane the greater one, where neither is NaN."""
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def exp_of_negative(self, x: Any) -> Any:
        """exp(x) for x <= 0, as a polynomial; 0 where it would be less than 1e-26.

        What is a float's smallest numbers times another takes a hundred times as long as other products.
        """
        builder = self._builder
        counts = builder.fcmp_ordered(">", x, self.in_all_lanes(-60.0))
        x = builder.select(counts, x, self.in_all_lanes(0.0))
        signature = ir.FunctionType(_VECTOR, [_VECTOR])
        floor = cgutils.get_or_insert_function(builder.module, signature, f"llvm.floor.v{LANES}f32")
        half = self.in_all_lanes(0.5)
        power = builder.call(floor, [self.add_product(half, x, self.in_all_lanes(1.4426950408889634))])
        rest = self.add_product(x, power, self.in_all_lanes(-0.693359375))
        rest = self.add_product(rest, power, self.in_all_lanes(2.12194440e-4))
        total = self.in_all_lanes(_EXP[0])
        for factor in _EXP[1:]:
            total = self.add_product(self.in_all_lanes(factor), total, rest)
        total = self.add_product(rest, builder.fmul(rest, rest), total)
        total = builder.fadd(total, self.in_all_lanes(1.0))
        exponent = builder.add(builder.fptosi(power, _INTEGERS), ir.Constant(_INTEGERS, [127] * LANES))
        scale = builder.bitcast(builder.shl(exponent, ir.Constant(_INTEGERS, [23] * LANES)), _VECTOR)
        return builder.select(counts, builder.fmul(total, scale), _ZERO)

    def add_product(self, total: Any, a: Any, b: Any) -> Any:
        return self._builder.fadd(total, self._builder.fmul(a, b, flags=_FUSED), flags=_FUSED)

    def store_sum(self, vector: Any, address: Any) -> None:
        """The sum of a vector's lanes, as one float."""
        total = self.sum_of(vector)
        self._builder.store(total, self._builder.inttoptr(address, _FLOAT.as_pointer()), align=_FLOAT_BYTES)

    def sum_of(self, vector: Any) -> Any:
        signature = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        reduce = cgutils.get_or_insert_function(self._builder.module, signature, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return self._builder.call(reduce, [ir.Constant(_FLOAT, 0.0), vector], fastmath=("reassoc",))

    def greatest_of(self, vector: Any) -> Any:
        signature = ir.FunctionType(_FLOAT, [_VECTOR])
        reduce = cgutils.get_or_insert_function(self._builder.module, signature, f"llvm.vector.reduce.fmax.v{LANES}f32")
        return self._builder.call(reduce, [vector], fastmath=("nnan",))

    def prefetch(self, address: Any) -> None:
        """Ask for a cache line that is read soon."""
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        fetch = cgutils.get_or_insert_function(self._builder.module, signature, "llvm.prefetch.p0")
        into_l2 = (0, 2, 1)  # for reading, second-level cache, data
        line = self._builder.inttoptr(address, pointer)
        self._builder.call(fetch, [line, *(ir.Constant(number, flag) for flag in into_l2)])

    def repeat(self, count: Any, totals: list[Any], body: Any) -> list[Any]:
        """A loop that runs at least once.

        Args:
            count: how often.
            totals: vectors at the start.
            body: called with the loop's index and the totals so far; returns the next ones.
        """
        builder, before = self._builder, self._builder.block
        loop, after = (builder.append_basic_block(name) for name in ("tile", "after"))
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_INT)
        index.add_incoming(ir.Constant(_INT, 0), before)
        sums = []
        for total in totals:
            sums.append(builder.phi(_VECTOR))
            sums[-1].add_incoming(total, before)
        updated = body(index, sums)
        following = builder.add(index, ir.Constant(_INT, 1))
        index.add_incoming(following, loop)
        for phi, total in zip(sums, updated, strict=True):
            phi.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        return list(updated)

    def _pointer(self, address: Any, vector: int) -> Any:
        return self._builder.inttoptr(self.at(address, vector, LANES * _FLOAT_BYTES), _VECTOR.as_pointer())


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
        emit = _Emitter(builder)
        x_rows = [emit.at(x, r, x_stride) for r in rows]

        def step(k, totals):
            at = emit.at(weight, k, len(vectors) * LANES * _FLOAT_BYTES)
            emit.prefetch(emit.at(ahead, k, ahead_stride))
            weights = [emit.load(at, v) for v in vectors]
            sums = []
            for r, row in enumerate(x_rows):
                factor = emit.load_everywhere(emit.at(row, k, _FLOAT_BYTES))
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
        emit = _Emitter(builder)
        query_rows = [emit.at(queries, q, query_stride) for q in rows]
        key_rows = [emit.at(keys, k, key_stride) for k in columns]

        def step(v, totals):
            some = [emit.load(emit.at(row, v, LANES * _FLOAT_BYTES)) for row in query_rows]
            places = [emit.at(row, v, LANES * _FLOAT_BYTES) for row in key_rows]
            others = [emit.load(place) for place in places]
            for place in places:
                emit.prefetch(builder.add(place, ahead))
            return [emit.add_product(totals[q * len(columns) + k], some[q], others[k]) for q in rows for k in columns]

        totals = emit.repeat(num_vectors, [_ZERO] * (len(rows) * len(columns)), step)
        for q in rows:
            row = emit.at(out, q, out_stride)
            for k in columns:
                emit.store_sum(totals[q * len(columns) + k], emit.at(row, k, _FLOAT_BYTES))

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
        emit = _Emitter(builder)
        weight_rows = [emit.at(weights, r, weight_stride) for r in rows]
        out_rows = [emit.at(out, r, out_stride) for r in rows]

        def step(i, totals):
            value = emit.at(values, i, value_stride)
            parts = [emit.load(value, v) for v in vectors]
            for v in vectors:
                emit.prefetch(emit.at(builder.add(value, ahead), v, LANES * _FLOAT_BYTES))
            factors = [emit.load_everywhere(emit.at(row, i, _FLOAT_BYTES)) for row in weight_rows]
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
        emit = _Emitter(builder)

        def step(v, peaks):
            return [emit.greater(emit.load(emit.at(values, v, LANES * _FLOAT_BYTES)), peaks[0])]

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
        emit = _Emitter(builder)
        peaks = emit.in_all_lanes(peak)

        def step(v, totals):
            at = emit.at(values, v, LANES * _FLOAT_BYTES)
            weights = emit.exp_of_negative(builder.fsub(emit.load(at), peaks))
            emit.store(weights, at)
            return [builder.fadd(totals[0], weights)]

        return emit.sum_of(*emit.repeat(num_vectors, [_ZERO], step))

    return types.float32(types.int64, types.int64, types.float32), generate
