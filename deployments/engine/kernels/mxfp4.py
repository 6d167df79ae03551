"""MXFP4 in plain torch: codes of 4 bits (e2m1), 32 of which share a power of two (e8m0). Knows no kernel and no layer.

Source: OCP Microscaling Formats (MX) Specification 1.0, 2023.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SHARED = 32  # numbers of a scale
NOT_A_NUMBER = 255  # as a scale
_BIAS = 127  # of the exponent of a scale
# What the codes 0 to 7 stand for; 8 to 15 are their negatives.
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Weights of experts.

    Attributes:
        codes: (E, rows, depth / 2) uint8, two codes each, the earlier one in the lower bits.
        scales: (E, rows, depth / 32) uint8, exponents and 127.
    """

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """The same numbers, (E, rows, depth), one expert after the other; None: they are not in MXFP4."""
        if weight.shape[-1] % SHARED:
            return None
        found = cls._empty(weight)
        for expert, numbers in enumerate(weight):
            found.codes[expert], found.scales[expert] = _encode(numbers)
            if not torch.equal(_decode(found.codes[expert], found.scales[expert]), numbers.float()):
                return None
        return found

    @classmethod
    def nearest(cls, weight: Tensor) -> Self:
        """Numbers in MXFP4 that are near those, (E, rows, depth), a multiple of 32 in each row."""
        found = cls._empty(weight)
        for expert, numbers in enumerate(weight):
            found.codes[expert], found.scales[expert] = _encode(numbers)
        return found

    @classmethod
    def _empty(cls, weight: Tensor) -> Self:
        shape = weight.shape[:-1]
        codes = torch.empty(*shape, weight.shape[-1] // 2, dtype=torch.uint8, device=weight.device)
        return cls(codes, torch.empty(*shape, weight.shape[-1] // SHARED, dtype=torch.uint8, device=weight.device))

    def widen(self, dtype: torch.dtype) -> Tensor:
        """(E, rows, depth) numbers, one expert after the other."""
        num_experts, rows, num_bytes = self.codes.shape
        out = torch.empty(num_experts, rows, 2 * num_bytes, dtype=dtype, device=self.codes.device)
        for numbers, codes, scales in zip(out, self.codes, self.scales, strict=True):
            numbers.copy_(_decode(codes, scales))
        return out


def _encode(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the nearest numbers in MXFP4, if there are such; (rows, depth) float."""
    groups = numbers.float().unflatten(-1, (-1, SHARED))
    # The largest number becomes 4 or 6, so smaller ones have the finest steps.
    exponents = (groups.abs().amax(-1).log2().floor() - 2).nan_to_num(neginf=0.0).clamp(1 - _BIAS, _BIAS)
    magnitudes = torch.ldexp(groups.abs(), -exponents.unsqueeze(-1)).unsqueeze(-1)
    known = torch.tensor(_NUMBERS, device=numbers.device)
    # Between neighbours in the list a number belongs to the nearer one.
    codes = (magnitudes > (known[1:] + known[:-1]) / 2).sum(-1, dtype=torch.uint8)
    codes = (codes | (groups < 0).byte() << 3).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + _BIAS).byte()


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 numbers of (..., depth / 2) codes and (..., depth / 32) scales."""
    known = torch.tensor((*_NUMBERS, *(-number for number in _NUMBERS)), device=codes.device)
    both = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()
    exponents = scales.int() - _BIAS
    return torch.ldexp(known[both].unflatten(-1, (-1, SHARED)), exponents.unsqueeze(-1)).flatten(-2)
