"""Products of a decode step's rows beside plain torch, where a GPU is on it and else in Triton's interpreter.

The interpreter has no bfloat16 products: float16 stands in.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels.cuda import gelu_mul, silu_mul  # isort: skip
from deployments.engine.kernels.cuda_step_products import (  # isort: skip
    Gate,
    StepTile,
    multiply_gated,
    multiply_rows,
    step_tile,
)

# A part of the depth is left over, whatever the splits, and of the columns as well.
DEPTH, NUM_COLUMNS = 144, 80
TILE = StepTile(rows=16, columns=64, depth=32, num_stages=2, num_warps=4)


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator).to(DEVICE, torch.float16)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).norm() <= 1e-3 * expected.float().norm()


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 37])
def test_products(num_rows: int, has_bias: bool, adds: bool, splits: int, generator: torch.Generator) -> None:
    x, weight = randn(1, num_rows, DEPTH, generator=generator), randn(NUM_COLUMNS, DEPTH, generator=generator) / 12
    bias = randn(NUM_COLUMNS, generator=generator) if has_bias else None
    shape = 1, num_rows, NUM_COLUMNS
    out = randn(*shape, generator=generator) if adds else torch.full(shape, torch.nan, dtype=x.dtype, device=DEVICE)
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    expected = expected + out.float() if adds else expected
    tile = StepTile(TILE.rows, TILE.columns, TILE.depth, TILE.num_stages, TILE.num_warps, splits)
    multiply_rows(x, weight, bias, out, tile, adds=adds)
    check(out, expected)


def test_splits_are_added_in_one_order_and_leave_nothing_behind(generator: torch.Generator) -> None:
    x, weight = randn(16, DEPTH, generator=generator), randn(NUM_COLUMNS, DEPTH, generator=generator)
    tile = StepTile(TILE.rows, TILE.columns, TILE.depth, TILE.num_stages, TILE.num_warps, splits=3)
    outs = [torch.empty(16, NUM_COLUMNS, dtype=x.dtype, device=DEVICE) for _ in range(3)]
    for out in outs:
        multiply_rows(x, weight, None, out, tile, adds=False)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(("gate", "activation"), [(Gate.SILU, silu_mul), (Gate.GELU, gelu_mul)])
@pytest.mark.parametrize("num_rows", [1, 37])
def test_gated_products_give_what_product_and_activation_give_one_after_the_other(
    num_rows: int, gate: Gate, activation: object, generator: torch.Generator
) -> None:
    x, weight = randn(1, num_rows, DEPTH, generator=generator), randn(2 * NUM_COLUMNS, DEPTH, generator=generator) / 12
    both = torch.empty(1, num_rows, 2 * NUM_COLUMNS, dtype=x.dtype, device=DEVICE)
    multiply_rows(x, weight, None, both, TILE, adds=False)
    out = torch.full((1, num_rows, NUM_COLUMNS), torch.nan, dtype=x.dtype, device=DEVICE)
    multiply_gated(x, weight, out, TILE, gate)
    assert callable(activation)
    check(out, activation(both))


@pytest.mark.parametrize("is_gated", [False, True])
def test_all_programs_of_a_product_run_at_once(is_gated: bool) -> None:
    for num_columns in (1024, 3072, 4096):
        for num_rows in range(1, 300):
            tile = step_tile(num_columns, 1024, num_rows, is_gated=is_gated)
            if tile is not None:
                assert -(-num_rows // tile.rows) * -(-num_columns // tile.columns) * tile.splits <= 132


def test_one_row_and_many_of_a_large_weight_are_left_to_others() -> None:
    deep = step_tile(4096, 14336, 33)
    assert deep is not None and (deep.rows, deep.splits) == (64, 2), "the weight is read once for all rows"
    narrow = step_tile(2048, 8192, 33)
    assert narrow is not None and narrow.rows == 32 and step_tile(8192, 28672, 33) is None
    assert step_tile(4096, 1024, 1) is None
    assert step_tile(4096, 1024, 64) is not None
    assert all(step_tile(4096, 4096, num_rows) is not None for num_rows in (2, 64))
    assert all(step_tile(4096, 4096, num_rows) is None for num_rows in (1, 65, 256))
    assert all(step_tile(14336, 4096, num_rows, is_gated=True) is not None for num_rows in (2, 128))
    assert all(step_tile(14336, 4096, num_rows, is_gated=True) is None for num_rows in (1, 129))
    assert step_tile(32768, 4096, 2) is None, "more programs than run at once"
    assert step_tile(1024, 1027, 64) is None, "rows that do not begin at 16 bytes"
