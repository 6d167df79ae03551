"""MXFP4 in the order that kernels read it in, in plain torch: what shares a register becomes numbers together."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from deployments.engine.kernels.mxfp4 import SHARED, Mxfp4

_CODES = 4  # in 16 bits
_SIGNS, _RESTS = (15, 14, 9, 13), (6, 3, 0, 10)  # where they are, from the lowest bit
_DEPTH = _CODES * SHARED  # of a block
# A code's bits, put where bfloat16 has its own, are the number times 2 ** -126. What that is multiplied with is
# 2 ** (scale - 1), whose exponent field is the scale and this.
_TO_MULTIPLIER = 126
_HIGHEST_SCALE = 254 - _TO_MULTIPLIER


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights of experts in the order that the kernel reads them in: E experts, `rows` of `depth` numbers.

    Attributes:
        words: (E, blocks, rows, 32) int16, blocks of 128 numbers, zeros behind the last one. Word i has the codes of
            numbers i, 32 + i, 64 + i and 96 + i of its block: their signs in the bits 15, 14, 9 and 13, the rest from
            the bits 6, 3, 0 and 10 on.
        multipliers: (E, blocks, rows) int32, four exponent fields of bfloat16, from the lowest byte.
        depth: numbers of a row.
    """

    words: Tensor
    multipliers: Tensor
    depth: int

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.multipliers.nbytes

    @classmethod
    def of(cls, weight: Mxfp4) -> Self:
        """Arrange weights, one expert after the other.

        Raises:
            ValueError: a scale that has no multiplier.
        """
        highest = int(weight.scales.max())
        if highest > _HIGHEST_SCALE:
            raise ValueError(f"a scale of 2**{highest - 127}; kernels read up to 2**{_HIGHEST_SCALE - 127}")
        (num_experts, rows, num_bytes), device = weight.codes.shape, weight.codes.device
        shape = num_experts, -(-2 * num_bytes // _DEPTH), rows
        words = torch.empty(*shape, SHARED, dtype=torch.int16, device=device)
        multipliers = torch.empty(shape, dtype=torch.int32, device=device)
        for expert in range(num_experts):
            words[expert] = _words_of(weight.codes[expert], shape[1])
            multipliers[expert] = _multipliers_of(weight.scales[expert], shape[1])
        return cls(words, multipliers, 2 * num_bytes)


def _words_of(codes: Tensor, blocks: int) -> Tensor:
    """(blocks, rows, 32) int16 of (rows, depth / 2) codes, two in each byte."""
    singles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).int()
    padded = functional.pad(singles, (0, blocks * _DEPTH - singles.shape[1]))
    parts = padded.unflatten(1, (blocks, _CODES, SHARED))
    signs, rests = (torch.tensor(bits, device=codes.device)[:, None] for bits in (_SIGNS, _RESTS))
    words: Tensor = (((parts >> 3) << signs) | ((parts & 7) << rests)).sum(2, dtype=torch.int32)
    return words.to(torch.int16).transpose(0, 1)


def _multipliers_of(scales: Tensor, blocks: int) -> Tensor:
    """(blocks, rows) int32 of (rows, depth / 32) scales."""
    fields = functional.pad(scales.int() + _TO_MULTIPLIER, (0, blocks * _CODES - scales.shape[1]))
    parts = fields.unflatten(1, (blocks, _CODES))
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=scales.device)
    together: Tensor = (parts << shifts).sum(2, dtype=torch.int32)
    return together.T
