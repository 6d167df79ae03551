"""Keys and values of 8 bits, in plain torch, for every device: codes, and a scale for each token's head.

The scale makes the largest number the largest code, which keeps it as it was: some models have a dimension that is much
larger than the others of its head. Kernels on a GPU do the same, bit for bit.
"""

import torch
from torch import Tensor

from deployments.engine.kernels.fp8 import FP8, LARGEST, LEAST_SCALE


def round_heads(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Round heads to codes.

    Args:
        numbers: (..., head_dim), finite.

    Returns:
        Codes (..., head_dim) float8_e4m3fn, and scales (...) float32.
    """
    values = numbers.float()
    # A product, since some devices make one of a quotient by a constant.
    scales = (values.abs().amax(-1) * (1 / LARGEST)).clamp_(min=LEAST_SCALE)
    return (values / scales.unsqueeze(-1)).clamp_(-LARGEST, LARGEST).to(FP8), scales


def widen_heads(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for.

    Args:
        codes: (..., head_dim) float8_e4m3fn.
        scales: (...) float32.
        dtype: of the result.
    """
    return (codes.float() * scales.unsqueeze(-1)).to(dtype)
