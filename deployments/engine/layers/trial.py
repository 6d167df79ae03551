"""Whether a replacement computes what it replaces: tried with random rows, since names and parts say too little."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

PROBE_ROWS = 4
# Relative differences that rounding makes: in bfloat16 and float16, and where an order of sums is the difference.
TOLERANCE, _TOLERANCE_OF_FLOAT32 = 2e-2, 1e-4
logger = logging.getLogger(__name__)


def is_near(out: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors of one shape are equal but for rounding."""
    return bool((out.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def random_rows(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, PROBE_ROWS, size), the same each time."""
    return torch.randn(1, PROBE_ROWS, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def computes_alike(original: Callable[[Tensor], object], ours: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether both give the same tensor for these rows; both may write over what they are given."""
    tolerance = _TOLERANCE_OF_FLOAT32 if rows.dtype is torch.float32 else TOLERANCE
    try:
        expected, out = original(rows.clone()), ours(rows.clone())
    except Exception as error:  # a module that only has the names of its parts in common with ours
        logger.debug("not replaced: %s", error)
        return False
    return isinstance(expected, Tensor) and expected.shape == out.shape and is_near(out, expected, tolerance)
