"""Numbers of 8 bits with scales: weights on a grid of their own, in plain torch, for every device.

A weight is held as codes (float8_e4m3fn) and one float32 scale for each tile of it: for each row, or for each block of
128 x 128 as some checkpoints have it. Knows no model and no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8
LEAST_SCALE = 2.0**-100  # of a row of zeros; no activation or weight is as small


@dataclass(frozen=True, slots=True)
class Scales:
    """One scale for each tile of a weight.

    Attributes:
        values: (number of tiles down, number of tiles across) float32.
        rows: of a tile.
        depth: columns of a tile.
    """

    values: Tensor
    rows: int
    depth: int

    def spread(self, num_rows: int, depth: int) -> Tensor:
        """The scale of each number of a weight of this shape."""
        down = self.values.repeat_interleave(self.rows, 0)[:num_rows]
        return down.repeat_interleave(self.depth, 1)[:, :depth]

    def by_row(self, num_rows: int) -> "Scales":
        """The same with tiles of one row."""
        if self.rows == 1:
            return self
        return Scales(self.values.repeat_interleave(self.rows, 0)[:num_rows].contiguous(), 1, self.depth)


def quantize(weight: Tensor) -> tuple[Tensor, Scales]:
    """Round a weight to codes, with a scale for each row that makes its largest number the largest code.

    Args:
        weight: (N, K), finite.

    Returns:
        Codes (N, K), and scales. A row of zeros keeps them.
    """
    values = weight.float()
    largest = values.abs().amax(-1, keepdim=True)
    scales = Scales((largest / LARGEST).clamp_(min=LEAST_SCALE), 1, weight.shape[1])
    return round_to(values, scales), scales


def round_to(weight: Tensor, scales: Scales) -> Tensor:
    """The nearest codes.

    Args:
        weight: (N, K).
        scales: of it.

    Returns:
        Codes (N, K). For what `dequantize` gave, in bfloat16 or finer, the codes that it came from: it rounds by much
        less than half the distance of two codes.
    """
    scaled = weight.float() / scales.spread(*weight.shape)
    return scaled.clamp_(-LARGEST, LARGEST).to(FP8)


def dequantize(codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for, rounded to a type.

    Args:
        codes: (N, K), of `FP8` or of any type that holds its values.
        scales: of them.
        dtype: of the result.
    """
    return (codes.float() * scales.spread(*codes.shape)).to(dtype)


def joined(parts: Sequence[Scales], num_rows: Sequence[int]) -> Scales | None:
    """Scales of weights put below each other.

    Args:
        parts: of each weight.
        num_rows: of each weight.

    Returns:
        None, if tiles across differ.
    """
    if len({(part.depth, part.values.shape[1]) for part in parts}) != 1:
        return None
    rows = {part.rows for part in parts}
    if len(rows) != 1 or any(count % part.rows for part, count in zip(parts[:-1], num_rows[:-1], strict=True)):
        parts = [part.by_row(count) for part, count in zip(parts, num_rows, strict=True)]
    return Scales(torch.cat([part.values for part in parts]), parts[0].rows, parts[0].depth)
