"""Numbers in FP8: how far from the originals, and that nothing but the grid decides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deployments.engine.kernels.fp8 import FP8, LARGEST, Scales, dequantize, joined, quantize, round_to

EVERY_CODE = torch.arange(256, dtype=torch.uint8).view(FP8)
EVERY_NUMBER = EVERY_CODE.float()[EVERY_CODE.float().isfinite()]


def weight_of(seed: int, num_rows: int, depth: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, depth, generator=generator) * torch.rand(num_rows, 1, generator=generator) ** 8


@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 9), depth=st.integers(1, 40))
def test_a_number_moves_by_a_sixteenth_or_by_half_of_the_least_code(seed: int, num_rows: int, depth: int) -> None:
    weight = weight_of(seed, num_rows, depth)
    codes, scales = quantize(weight)
    error = (dequantize(codes, scales, torch.float32) - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, scales.values * 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_code_is_found_again_whatever_its_scale(dtype: torch.dtype) -> None:
    scales = Scales(torch.logspace(-3, 1, 400).unsqueeze(1), 1, len(EVERY_NUMBER))
    codes = EVERY_NUMBER.expand(400, -1).to(FP8)
    assert torch.equal(round_to(dequantize(codes, scales, dtype), scales).float(), codes.float())


def test_a_row_of_zeros_keeps_them() -> None:
    codes, scales = quantize(torch.zeros(2, 8))
    assert torch.equal(dequantize(codes, scales, torch.bfloat16), torch.zeros(2, 8, dtype=torch.bfloat16))
    assert torch.equal(codes.float(), torch.zeros(2, 8))


def test_huge_and_tiny_rows_do_not_disturb_each_other() -> None:
    weight = torch.tensor([[1e30, -1e30, 1e28], [1e-20, 1e-21, 0.0]])
    codes, scales = quantize(weight)
    assert codes[0, 0].float() == LARGEST and codes[1, 0].float() == LARGEST
    torch.testing.assert_close(dequantize(codes, scales, torch.float32), weight, rtol=1 / 16, atol=0)


def test_a_number_beyond_the_grid_becomes_its_largest() -> None:
    codes = round_to(torch.tensor([[1e6, -1e6]]), Scales(torch.ones(1, 1), 1, 2))
    assert codes.float().tolist() == [[LARGEST, -LARGEST]]


def test_a_weight_that_is_not_finite_shows_in_its_scale() -> None:
    _, scales = quantize(torch.tensor([[1.0, torch.inf], [torch.nan, 1.0], [1.0, 2.0]]))
    assert scales.values.isfinite().flatten().tolist() == [False, False, True]


@pytest.mark.parametrize(("rows", "counts"), [(1, (3, 5)), (4, (8, 6)), (4, (6, 8)), (4, (4, 3, 2))])
def test_scales_of_weights_below_each_other(rows: int, counts: tuple[int, ...]) -> None:
    parts = [Scales(torch.rand(-(-count // rows), 3), rows, 5) for count in counts]
    together = joined(parts, counts)
    assert together is not None
    expected = torch.cat([part.spread(count, 12) for part, count in zip(parts, counts, strict=True)])
    assert torch.equal(together.spread(sum(counts), 12), expected)


def test_scales_of_whole_weights_below_each_other() -> None:
    parts = [Scales(torch.rand(1, 1), count, 12) for count in (4, 6)]
    together = joined(parts, (4, 6))
    assert together is not None
    assert torch.equal(together.spread(10, 12)[:, 0], torch.tensor([float(p.values) for p in parts])[[0] * 4 + [1] * 6])


def test_scales_of_other_depths_are_not_joined() -> None:
    assert joined([Scales(torch.rand(2, 3), 1, 5), Scales(torch.rand(2, 2), 1, 8)], (2, 2)) is None
