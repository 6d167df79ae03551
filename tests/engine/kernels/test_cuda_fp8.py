"""Products with weights in FP8 beside plain torch, where a GPU is on it and else in Triton's interpreter.

The interpreter cuts numbers off when it makes codes of them, where a GPU rounds, and forgets to carry what it rounds up
to a power of 2; so products are compared given their codes, and codes with room for that. It has no bfloat16 products:
float16 stands in.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels.cuda import rms_norm  # isort: skip
from deployments.engine.kernels.cuda_fp8 import Fp8Weight, one_row  # isort: skip
from deployments.engine.kernels.cuda_fp8_prompts import Tile, many_rows  # isort: skip
from deployments.engine.kernels.cuda_fp8_rows import (  # isort: skip
    Fp8Rows,
    gelu_mul_quantized,
    quantize_rows,
    rms_norm_quantized,
    silu_mul_quantized,
)

from deployments.engine.kernels.fp8 import LARGEST, Scales, dequantize, quantize, round_to

TILE = Tile(rows=16, columns=16, depth=32, num_stages=2, num_warps=4)
OF_BLOCKS = Tile(rows=16, columns=16, depth=128, num_stages=2, num_warps=4, stays=False)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """For one draw in fifty the interpreter's lost carry is more than the room for it."""
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float16)


def build_weight(num_columns: int, depth: int, *, blocks: bool = False) -> Fp8Weight:
    weight = torch.randn(num_columns, depth, device=DEVICE) / depth**0.5
    if not blocks:
        return Fp8Weight(*quantize(weight))
    shape = -(-num_columns // 128), -(-depth // 128)
    scales = Scales((0.5 + torch.rand(shape, device=DEVICE)) / 100, 128, 128)
    return Fp8Weight(round_to(weight, scales), scales)


def expect(x: Tensor, weight: Fp8Weight, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    full = dequantize(weight.codes, weight.scales, torch.float32)
    product = functional.linear(x.float(), full, None if bias is None else bias.float())
    return product if residual is None else product + residual.float()


def check(actual: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    assert actual.shape == expected.shape
    assert (actual.float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1])
def test_one_row(num_rows: int, blocks: bool, has_bias: bool, adds: bool) -> None:
    x, weight = randn(1, num_rows, 1296), build_weight(144, 1296, blocks=blocks)
    bias = randn(144) if has_bias else None
    out = randn(1, num_rows, 144) if adds else torch.full((1, num_rows, 144), torch.nan, dtype=x.dtype, device=DEVICE)
    expected = expect(x, weight, bias, out if adds else None)
    one_row(x, weight, bias, out, adds=adds)
    check(out, expected)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_many_rows(num_rows: int, weight_first: bool, blocks: bool, has_bias: bool, adds: bool) -> None:
    weight = build_weight(144, 272, blocks=blocks)
    x = quantize_rows(randn(num_rows, 272))
    bias = randn(144) if has_bias else None
    out = randn(num_rows, 144) if adds else torch.full((num_rows, 144), torch.nan, dtype=x.dtype, device=DEVICE)
    expected = expect(x.codes.float() * x.scales, weight, bias, out if adds else None)
    tile = replace(OF_BLOCKS if blocks else TILE, weight_first=weight_first)
    many_rows(x, weight, bias, out, tile, adds=adds)
    check(out, expected)


def test_rows_are_rounded_each_on_its_own_grid() -> None:
    x = randn(2, 3, 80) * torch.tensor([1e-3, 1.0, 50.0], device=DEVICE).half()[:, None]
    x[0, 1] = 0
    rows = quantize_rows(x)
    assert rows.shape == x.shape and rows.dtype == x.dtype
    check_codes(rows, x.view(6, 80).float())
    assert (rows.codes[1].float() == 0).all(), "a row of zeros"
    assert len(rows.padded) == 16 and (rows.padded[6:].float() == 0).all()


def check_codes(rows: Fp8Rows, expected: Tensor) -> None:
    largest = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(rows.scales, (largest / LARGEST).clamp(min=2.0**-100), rtol=2e-3, atol=0)
    error = (rows.codes.float() * rows.scales - expected).abs()
    if DEVICE.type == "cuda":
        assert (error <= torch.maximum(expected.abs() / 16, rows.scales * 2.0**-10) * 1.01).all()
    assert error.norm() <= 0.1 * expected.norm()


def test_norms_are_rounded_where_they_are_computed() -> None:
    x, weight = randn(2, 3, 80), randn(80)
    expected = rms_norm(x, weight, 1e-5)
    rows = rms_norm_quantized(x, weight, 1e-5)
    assert rows.shape == x.shape
    check_codes(rows, expected.view(6, 80).float())


def test_activations_are_rounded_where_they_are_computed() -> None:
    gate_up = randn(3, 2 * 80)
    gate, up = gate_up.float().chunk(2, -1)
    check_codes(silu_mul_quantized(gate_up), (functional.silu(gate).half() * up.half()).float())
    expected = (functional.gelu(gate, approximate="tanh").half() * up.half()).float()
    check_codes(gelu_mul_quantized(gate_up), expected)
