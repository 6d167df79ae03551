"""Vectors of the CPU at hand, and how numba's compiler is had to write them: what register tiles are made of.

LLVM does not turn numba's loops into these: it reloads and stores accumulators that fit in registers, sums each dot
product by itself, and takes the greatest of a row one by one. numba's cache on disk does not see changes of this file,
nor of those that import it: remove `__pycache__` after one.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config

_CHOSEN = config.CPU_FEATURES  # type: ignore[attr-defined]  # what numba compiles for; None: for this CPU
_FEATURES = llvm.get_host_cpu_features().flatten() if _CHOSEN is None else _CHOSEN
# Floats of a vector, and vectors that fit in registers. Where registers are shorter LLVM splits a vector: ARM's 32 of 4
# floats hold as many as 16 of 8.
LANES, NUM_REGISTERS = (16, 32) if "+avx512f" in _FEATURES else (8, 16)

FLOAT_BYTES = 4
_FLOAT = ir.FloatType()
INT = ir.IntType(64)
VECTOR = ir.VectorType(_FLOAT, LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)
_UNDEFINED = ir.Constant(VECTOR, ir.Undefined)
_FIRST = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
# Of Cephes' expf, the highest power first; 1 + x follow.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_SHIFT = 1.5 * 2**23
# A product and its sum may become one instruction; the order of the sums stays. What has no flags would get all
# liberties from a caller that numba compiles with fastmath.
_FUSED = ("contract",)


class Emitter:
    """Writes vector code at an LLVM builder's place."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def at(self, address: Any, index: Any, stride: Any) -> Any:
        """Address of an element: a plain number costs nothing at run time."""
        index, stride = (ir.Constant(INT, x) if isinstance(x, int) else x for x in (index, stride))
        return self._builder.add(address, self._builder.mul(index, stride))

    def load(self, address: Any, vector: int = 0) -> Any:
        """The n-th vector from an address on."""
        return self._builder.load(self._pointer(address, vector), align=FLOAT_BYTES)

    def store(self, value: Any, address: Any, vector: int = 0) -> None:
        self._builder.store(value, self._pointer(address, vector), align=FLOAT_BYTES)

    def load_everywhere(self, address: Any) -> Any:
        """One float in all lanes."""
        return self.in_all_lanes(
            self._builder.load(self._builder.inttoptr(address, _FLOAT.as_pointer()), align=FLOAT_BYTES)
        )

    def load_integers(self, address: Any, bits: int, vector: int = 0, *, is_signed: bool = False) -> Any:
        """The n-th LANES integers of a few bits from an address on, each as one of 32 bits."""
        builder, few = self._builder, ir.VectorType(ir.IntType(bits), LANES)
        pointer = builder.inttoptr(self.at(address, vector, LANES * bits // 8), few.as_pointer())
        values = builder.load(pointer, align=1)
        return builder.sext(values, INTEGERS) if is_signed else builder.zext(values, INTEGERS)

    def in_all_lanes(self, value: Any) -> Any:
        """A float, or a plain number, in all lanes."""
        if isinstance(value, float):
            return ir.Constant(VECTOR, [value] * LANES)
        vector = self._builder.insert_element(_UNDEFINED, value, ir.Constant(ir.IntType(32), 0))
        return self._builder.shuffle_vector(vector, _UNDEFINED, _FIRST)

    def greater(self, a: Any, b: Any) -> Any:
        """In each lane the greater one, where neither is NaN."""
        return self._builder.select(self._builder.fcmp_ordered(">", a, b), a, b)

    def exp_of_negative(self, vectors: list[Any], least: float) -> list[Any]:
        """exp(x) for x <= 0 of some vectors, as a polynomial.

        Each step is written for all vectors before the next one: a vector's steps wait for each other, and the CPU does
        not look far enough ahead to find another vector's.

        Args:
            vectors: x.
            least: where x is not greater the result is 0; -86 or more, of which exp is a normal number.
        """
        builder, everywhere = self._builder, self.in_all_lanes
        counts = [builder.fcmp_ordered(">", x, everywhere(least)) for x in vectors]
        # Beside so large a number a float has no digits behind its point, and its lowest bits are the power itself.
        shifted = [self.add_product(everywhere(_SHIFT), x, everywhere(1.4426950408889634)) for x in vectors]
        powers = [builder.fsub(number, everywhere(_SHIFT), flags=_FUSED) for number in shifted]
        rests = [self.add_product(x, n, everywhere(-0.693359375)) for x, n in zip(vectors, powers, strict=True)]
        rests = [self.add_product(x, n, everywhere(2.12194440e-4)) for x, n in zip(rests, powers, strict=True)]
        totals = [everywhere(_EXP[0])] * len(vectors)
        for factor in _EXP[1:]:
            totals = [self.add_product(everywhere(factor), p, x) for p, x in zip(totals, rests, strict=True)]
        squares = [builder.fmul(x, x, flags=_FUSED) for x in rests]
        totals = [self.add_product(x, xx, p) for x, xx, p in zip(rests, squares, totals, strict=True)]
        totals = [self.add(total, everywhere(1.0)) for total in totals]
        place = ir.Constant(INTEGERS, [23] * LANES)
        exponents = [builder.shl(builder.bitcast(number, INTEGERS), place) for number in shifted]
        bits = [builder.add(builder.bitcast(p, INTEGERS), n) for p, n in zip(totals, exponents, strict=True)]
        return [builder.select(c, builder.bitcast(x, VECTOR), ZERO) for c, x in zip(counts, bits, strict=True)]

    def negative_of(self, x: Any) -> Any:
        """-|x|."""
        sign = ir.Constant(INTEGERS, [-(1 << 31)] * LANES)
        return self._builder.bitcast(self._builder.or_(self._builder.bitcast(x, INTEGERS), sign), VECTOR)

    def add(self, a: Any, b: Any) -> Any:
        return self._builder.fadd(a, b, flags=_FUSED)

    def add_product(self, total: Any, a: Any, b: Any) -> Any:
        return self._builder.fadd(total, self._builder.fmul(a, b, flags=_FUSED), flags=_FUSED)

    def store_sum(self, vector: Any, address: Any) -> None:
        """The sum of a vector's lanes, as one float."""
        signature = ir.FunctionType(_FLOAT, [_FLOAT, VECTOR])
        reduce = cgutils.get_or_insert_function(self._builder.module, signature, f"llvm.vector.reduce.fadd.v{LANES}f32")
        total = self._builder.call(reduce, [ir.Constant(_FLOAT, 0.0), vector], fastmath=("reassoc",))
        self._builder.store(total, self._builder.inttoptr(address, _FLOAT.as_pointer()), align=FLOAT_BYTES)

    def store_greatest(self, vector: Any, address: Any) -> None:
        """The greatest of a vector's lanes, as one float."""
        signature = ir.FunctionType(_FLOAT, [VECTOR])
        reduce = cgutils.get_or_insert_function(self._builder.module, signature, f"llvm.vector.reduce.fmax.v{LANES}f32")
        greatest = self._builder.call(reduce, [vector], fastmath=("nnan",))
        self._builder.store(greatest, self._builder.inttoptr(address, _FLOAT.as_pointer()), align=FLOAT_BYTES)

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
        index = builder.phi(INT)
        index.add_incoming(ir.Constant(INT, 0), before)
        sums = []
        for total in totals:
            sums.append(builder.phi(VECTOR))
            sums[-1].add_incoming(total, before)
        updated = body(index, sums)
        following = builder.add(index, ir.Constant(INT, 1))
        index.add_incoming(following, loop)
        for phi, total in zip(sums, updated, strict=True):
            phi.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        return list(updated)

    def _pointer(self, address: Any, vector: int) -> Any:
        return self._builder.inttoptr(self.at(address, vector, LANES * FLOAT_BYTES), VECTOR.as_pointer())
