"""Weights are kept in the fewest bytes that give back the same floats, and in no fewer."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from deployments.engine.kernels import cpu_matmul
from deployments.engine.kernels.cpu_matmul import PackedWeight, linear
from deployments.engine.kernels.cpu_unpack import BYTES, FLOATS, GROUP, HALVES, NIBBLES, WIDTH, Codes, compact

_FORMS = {"Q4_0": NIBBLES, "Q4_1": NIBBLES, "Q8_0": BYTES, "Q5_0": FLOATS, "BF16": HALVES, "F16": FLOATS}


def random_weight(num_columns: int, depth: int, quantised: str | None = None) -> Tensor:
    """As a GGUF file would give it back."""
    weight = np.random.default_rng(0).standard_normal((num_columns, depth), np.float32)
    if quantised is None:
        return torch.from_numpy(weight)
    kind = gguf.GGMLQuantizationType[quantised]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))


def form_of(weight: Tensor) -> int:
    panel_bytes: int = PackedWeight(weight, None).panels.shape[1]
    return panel_bytes * GROUP // (weight.shape[1] * WIDTH)


def product_of_floats(x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(cpu_matmul, "compact", lambda weight: weight)
        packed = PackedWeight(weight, None)
    assert packed.panels.shape[1] == 4 * WIDTH * weight.shape[1]
    return linear(x, packed)


@pytest.mark.parametrize("quantised", _FORMS)
@pytest.mark.parametrize("num_rows", [1, 3, 16, 130])
def test_a_product_has_the_same_bits_as_that_of_the_floats(
    quantised: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(2 * WIDTH + 5, 7 * GROUP, quantised)
    assert form_of(weight) == _FORMS[quantised]
    x = torch.randn(num_rows, weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = product_of_floats(x, weight, monkeypatch)
    assert torch.equal(linear(x, PackedWeight(weight, None)), expected)
    torch.testing.assert_close(expected, x @ weight.T, rtol=1e-5, atol=1e-4)


def test_weights_that_one_form_held_are_merged_in_it() -> None:
    weight = torch.cat([random_weight(40, 64, "Q4_0"), random_weight(8, 64, "Q4_0")])
    assert form_of(weight) == NIBBLES
    assert form_of(torch.cat([weight, random_weight(8, 64, "Q8_0")])) == FLOATS


@pytest.mark.parametrize(("quantised", "step"), [("Q4_1", 2**-20), ("Q8_0", 2**-20), ("BF16", 2**-12)])
def test_a_weight_that_differs_in_one_bit_is_kept_as_floats(quantised: str, step: float) -> None:
    weight = random_weight(WIDTH + 9, 64, quantised)
    weight[-1, -1] *= 1 + step
    assert form_of(weight) == FLOATS


def test_all_weights_alike_take_few_bytes() -> None:
    for value in (0.0, 0.5, -3.0):
        weight = torch.full((5, 32), value)
        packed = PackedWeight(weight, None)
        torch.testing.assert_close(linear(torch.ones(2, 32), packed), torch.full((2, 5), 32 * value))
    assert form_of(torch.zeros(5, 32)) == NIBBLES


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), 1e30, 1e-40])
def test_strange_weights_stay_what_they_are(strange: float) -> None:
    weight = random_weight(4, 32, "Q8_0")
    weight[2, 3] = strange
    out = linear(torch.eye(32), PackedWeight(weight, None)).T
    rest = torch.ones_like(weight, dtype=torch.bool)
    rest[2] = False
    assert torch.equal(out[rest], weight[rest])
    if np.isfinite(strange):
        assert out[2, 3] == weight[2, 3]


@pytest.mark.parametrize("depth", [1, 31, 33, 70, 200])
def test_a_depth_of_no_whole_groups_is_kept_as_halves_or_floats(depth: int) -> None:
    weight = random_weight(WIDTH + 1, depth)
    assert form_of(weight) == FLOATS
    halves = weight.bfloat16().float()
    assert form_of(halves) == HALVES
    x = torch.randn(3, depth, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x, PackedWeight(halves, None)), x @ halves.T, rtol=1e-5, atol=1e-4)


def test_what_is_found_are_the_codes_of_the_file() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0).reshape(3, 2, 34)
    found = compact(torch.from_numpy(gguf.quants.dequantize(blocks.reshape(3, -1), gguf.GGMLQuantizationType.Q8_0)))
    assert isinstance(found, Codes)
    assert np.array_equal(found.codes.numpy().reshape(3, 2, 32), blocks[:, :, 2:].view(np.int8))
    assert np.array_equal(found.scales.numpy(), blocks[:, :, :2].copy().view(np.float16)[..., 0].astype(np.float32))
