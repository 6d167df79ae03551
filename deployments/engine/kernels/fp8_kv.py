"""Keys and values of 8 bits, in plain torch, for every device: codes, and a scale for each token's head.

A scale is a power of 2. So what a code stands for is a number of bfloat16 as well, and whoever attends, by whatever
kernel, works with the same numbers; codes of floating point lose nothing by it but the range between two powers.
"""

import torch
from torch import Tensor

from deployments.engine.kernels.fp8 import FP8, LARGEST

# Adding it to the bits of a number carries into the exponent if its mantissa is above that of `LARGEST`, 1.75.
_ABOVE_LARGEST = 0x1FFFFF
# Exponents, as their bits say them: of `LARGEST`, less the bias; of the least scale, 2**-100.
_EXPONENT_OF_LARGEST, _LEAST_EXPONENT = 8, 27
_MANTISSA_BITS = 23


def round_heads(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Round heads to codes, each with the least power of 2 as its scale that keeps its largest number.

    Args:
        numbers: (..., head_dim), finite.

    Returns:
        Codes (..., head_dim) float8_e4m3fn, and scales (...) float32.
    """
    values = numbers.float()
    bits = values.abs().amax(-1).view(torch.int32)
    exponents = ((bits + _ABOVE_LARGEST) >> _MANTISSA_BITS) - _EXPONENT_OF_LARGEST
    scales = (exponents.clamp_(min=_LEAST_EXPONENT) << _MANTISSA_BITS).view(torch.float32)
    return (values / scales.unsqueeze(-1)).clamp_(-LARGEST, LARGEST).to(FP8), scales


def widen_heads(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for.

    Args:
        codes: (..., head_dim) float8_e4m3fn.
        scales: (...) float32.
        dtype: of the result; bfloat16 and float32 hold them all.
    """
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)
