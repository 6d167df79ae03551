"""Where a token's KV lies in the pool: the arithmetic of block tables, for all who lay out a step or write one.

Compiled loops and kernels can call nothing of this: those that are given slots or tables (the layout of a step, too:
`batch/build.py`) divide by the block's size themselves.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Integers = TypeVar("Integers", np.ndarray, "Tensor")


def slots(tables: np.ndarray, rows: np.ndarray | int, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Map token positions to slots of the pool, its blocks behind each other.

    Args:
        tables: (..., S, B) integer block ids of S sequences, each in its order; what a row holds behind its blocks is
            not read.
        rows: (T,) integer, whose token each one is; a number: all are of that sequence.
        positions: (T,) integer, within the sequence, covered by its table.
        block_size: tokens per block.

    Returns:
        (..., T) slots, of the wider type of tables and positions; the table [7, 2] with blocks of 16 maps [15, 16] to
        [127, 32].

    Source: PagedAttention (Kwon et al., SOSP 2023), section 4.
    """
    found: np.ndarray = tables[..., rows, positions // block_size] * block_size + positions % block_size
    return found


def places(slots: Integers, block_size: int) -> tuple[Integers, Integers]:
    """Map slots back to blocks and tokens within them, each (T,); blocks of 16 map 127 to block 7, token 15."""
    return slots // block_size, slots % block_size
