"""Weights in the fewest bytes that hold exactly the same floats, and how a product gets them back.

A decode step is bound by reading the weights. Few models' weights need the 32 bits of a float: nearly all are published
as bfloat16, those in GGUF files as a few bits and a scale for each 32. Whether a weight is exactly that is found by
looking at it (`compact`). Its product has the same bits as that of the floats.

A panel is WIDTH columns of the weight. Its bytes hold, by form, for each 32 rows:
- FLOATS: the floats, (32, WIDTH).
- HALVES: the upper halves of the floats, (32, WIDTH) uint16.
- BYTES: scales (WIDTH,) float32; codes (32, WIDTH) int8. A float is code * scale.
- NIBBLES: scales and starts, (2, WIDTH) float32; codes (16, WIDTH) uint8, row j in the lower four bits, row j + 16 in
  the upper ones. A float is code * scale + start.

Source of the last two: the formats Q8_0, Q4_0 and Q4_1 of llama.cpp.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, call-arg"

from dataclasses import dataclass

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from deployments.engine.compiled import njit
from deployments.engine.kernels.cpu_vectors import FLOAT_BYTES, INTEGERS, LANES, VECTOR, Emitter

# Of a panel: as many columns as the product's tiles take.
VECTORS = 3
WIDTH = VECTORS * LANES
GROUP = 32
# Bytes of a column for each 32 rows, which names the form.
FLOATS, HALVES, BYTES, NIBBLES = 128, 64, 36, 24
# Rows that are looked at before all of them are: most weights are of another form from their first row on.
_FIRST_ROWS = 8
_ROWS_AT_ONCE = 1 << 12
# A scale with these bits clear gives exact products with codes of 4 bits, or of 7 and a sign.
_LOW_BITS = {NIBBLES: 0xF, BYTES: 0x7F}


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight (N, K) as codes.

    Attributes:
        form: BYTES or NIBBLES.
        codes: (N, K) int8 or uint8.
        scales: (N, K / 32) float32.
        starts: as scales; zeros for BYTES.
    """

    form: int
    codes: Tensor
    scales: Tensor
    starts: Tensor


def compact(weight: Tensor) -> Tensor | Codes:
    """The smallest form that gives back the same floats, bit by bit.

    Args:
        weight: (N, K) float32.

    Returns:
        As codes, or as bfloat16, or as it is.
    """
    if weight.shape[1] % GROUP == 0:
        for form in (NIBBLES, BYTES):
            if (codes := _encode(weight, form)) is not None:
                return codes
    if all(torch.equal(part.bfloat16().float(), part) for part in (weight[:_FIRST_ROWS], weight)):
        return weight.bfloat16()
    return weight


def _encode(weight: Tensor, form: int) -> Codes | None:
    if _encode_rows(weight[:_FIRST_ROWS], form) is None:
        return None
    parts = []
    for rows in weight.split(_ROWS_AT_ONCE):
        if (part := _encode_rows(rows, form)) is None:
            return None
        parts.append(part)
    return Codes(form, *(torch.cat(part) for part in zip(*parts, strict=True)))


def _encode_rows(weight: Tensor, form: int) -> tuple[Tensor, Tensor, Tensor] | None:
    groups = weight.unflatten(1, (-1, GROUP))
    least, greatest = groups.aminmax(dim=-1)
    farthest = torch.where(-least > greatest, least, greatest)
    zero = torch.zeros_like(least)
    if form == BYTES:
        candidates, bounds, dtype = [(farthest.abs() / 127, zero)], (-127, 127), torch.int8
    else:  # Q4_1 goes from the least to the greatest in 15 steps, Q4_0 from the one that is farthest from zero
        candidates = [((greatest - least) / 15, least), (farthest / -8, farthest)]
        bounds, dtype = (0, 15), torch.uint8
    for scales, starts in candidates:
        scales = scales.half().float()  # as they are in files
        if not torch.isfinite(scales).all() or (scales.view(torch.int32) & _LOW_BITS[form]).any():
            continue
        codes = (groups - starts.unsqueeze(-1)).div_(scales.unsqueeze(-1)).round_().nan_to_num_(0).clamp_(*bounds)
        if torch.equal((codes * scales.unsqueeze(-1)).add_(starts.unsqueeze(-1)), groups):
            return codes.flatten(1).to(dtype), scales, starts
    return None


def pack(weight: Tensor | Codes) -> np.ndarray:
    """A weight as panels.

    Args:
        weight: (N, K), what `compact` gives.

    Returns:
        (ceil(N / WIDTH), bytes of a panel) uint8; zeros where there is no column.
    """
    if isinstance(weight, Tensor):
        return _view_bytes(_lay_out(weight))
    num_groups = weight.scales.shape[1]
    # (panels, groups, rows of a group, WIDTH)
    codes = _lay_out(weight.codes).unflatten(1, (num_groups, GROUP))
    if weight.form == NIBBLES:
        codes = codes[:, :, : GROUP // 2] | codes[:, :, GROUP // 2 :] << 4
    factors = [weight.scales, weight.starts] if weight.form == NIBBLES else [weight.scales]
    parts = [_lay_out(part).unsqueeze(2) for part in factors] + [codes]
    return np.concatenate([_view_bytes(part, 2) for part in parts], axis=2).reshape(len(codes), -1)


def _lay_out(weight: Tensor) -> Tensor:
    """(N, K) to (ceil(N / WIDTH), K, WIDTH), in memory that torch aligns to cache lines."""
    num_columns, depth = weight.shape
    full = num_columns // WIDTH
    panels = torch.zeros(-(-num_columns // WIDTH), depth, WIDTH, dtype=weight.dtype)
    panels[:full] = weight[: full * WIDTH].view(full, WIDTH, depth).transpose(1, 2)
    if full < len(panels):
        panels[full, :, : num_columns - full * WIDTH] = weight[full * WIDTH :].t()
    return panels


def _view_bytes(part: Tensor, num_dims: int = 1) -> np.ndarray:
    """The bytes of what lies behind the first dimensions."""
    result: np.ndarray = part.reshape(*part.shape[:num_dims], -1).view(torch.uint8).numpy()
    return result


@njit(nogil=True)
def unpack(panel, form, begin, count, out):
    """Rows of a panel as floats; addresses.

    Args:
        panel: address.
        form: of the panel.
        begin: first row; a multiple of 32 if the panel is of codes.
        count: of rows; likewise.
        out: address of (count, WIDTH) floats to fill; untouched if the panel is of floats.

    Returns:
        Address of the floats.
    """
    if form == FLOATS:
        return panel + begin * (FLOAT_BYTES * WIDTH)
    if form == HALVES:
        _unpack_halves(panel + begin * (FLOAT_BYTES // 2 * WIDTH), count * VECTORS, out)
        return out
    record = panel + begin // GROUP * (form * WIDTH)
    for _ in range(count // GROUP):
        if form == NIBBLES:
            _unpack_nibbles(record, out)
        else:
            _unpack_bytes(record, out)
        record += form * WIDTH
        out += GROUP * FLOAT_BYTES * WIDTH
    return out - count * (FLOAT_BYTES * WIDTH)


@intrinsic
def _unpack_halves(_, halves, num_vectors, out):
    """The floats whose upper halves are given; addresses."""

    def generate(_context, builder, _signature, args):
        halves, num_vectors, out = args
        emit = Emitter(builder)

        def step(v, _totals):
            upper = builder.shl(
                emit.load_integers(emit.at(halves, v, LANES * 2), 16), ir.Constant(INTEGERS, [16] * LANES)
            )
            emit.store(builder.bitcast(upper, VECTOR), emit.at(out, v, LANES * FLOAT_BYTES))
            return []

        emit.repeat(num_vectors, [], step)

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _unpack_bytes(_, record, out):
    """32 rows of a panel of BYTES; addresses."""

    def generate(_context, builder, _signature, args):
        record, out = args
        emit = Emitter(builder)
        scales = [emit.load(record, v) for v in range(VECTORS)]
        codes = emit.at(record, FLOAT_BYTES, WIDTH)

        def step(k, _totals):
            row, to = emit.at(codes, k, WIDTH), emit.at(out, k, FLOAT_BYTES * WIDTH)
            for v, scale in enumerate(scales):
                code = builder.sitofp(emit.load_integers(row, 8, v, is_signed=True), VECTOR)
                emit.store(builder.fmul(code, scale), to, v)
            return []

        emit.repeat(ir.Constant(ir.IntType(64), GROUP), [], step)

    return types.void(types.int64, types.int64), generate


@intrinsic
def _unpack_nibbles(_, record, out):
    """32 rows of a panel of NIBBLES; addresses."""

    def generate(_context, builder, _signature, args):
        record, out = args
        emit = Emitter(builder)
        scales = [emit.load(record, v) for v in range(VECTORS)]
        starts = [emit.load(record, VECTORS + v) for v in range(VECTORS)]
        codes, upper_rows = emit.at(record, 2 * FLOAT_BYTES, WIDTH), emit.at(out, GROUP // 2 * FLOAT_BYTES, WIDTH)
        four, low_bits = (ir.Constant(INTEGERS, [number] * LANES) for number in (4, 0xF))

        def step(k, _totals):
            row = emit.at(codes, k, WIDTH)
            for v, (scale, start) in enumerate(zip(scales, starts, strict=True)):
                pair = emit.load_integers(row, 8, v)
                for rows, code in ((out, builder.and_(pair, low_bits)), (upper_rows, builder.lshr(pair, four))):
                    weight = emit.add_product(start, builder.sitofp(code, VECTOR), scale)
                    emit.store(weight, emit.at(rows, k, FLOAT_BYTES * WIDTH), v)
            return []

        emit.repeat(ir.Constant(ir.IntType(64), GROUP // 2), [], step)

    return types.void(types.int64, types.int64), generate
