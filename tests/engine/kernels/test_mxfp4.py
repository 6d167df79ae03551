"""MXFP4: numbers keep their value when they are packed, and products with packed weights are those with the numbers."""

import pytest
import torch
from torch import Tensor

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels.cuda_experts import Gate, Tile, down, gate_up  # isort: skip
from deployments.engine.kernels.cuda_mxfp4 import packed_product  # isort: skip
from deployments.engine.kernels.cuda_routing import plan_blocks  # isort: skip

from deployments.engine.kernels.mxfp4 import SHARED, Mxfp4
from deployments.engine.kernels.mxfp4_words import Packed

TILE = Tile(columns=32, depth=32, num_stages=2, num_warps=4)
OF_GPT_OSS = Gate(limit=2.0, alpha=1.702)
NUM_EXPERTS = 3


def packed(rows: int, depth: int, *, lowest: int = 120, highest: int = 126) -> Mxfp4:
    """Any codes at all, with scales of a range."""
    codes = torch.randint(0, 256, (NUM_EXPERTS, rows, depth // 2), device=DEVICE).byte()
    return Mxfp4(codes, torch.randint(lowest, highest, (NUM_EXPERTS, rows, depth // SHARED), device=DEVICE).byte())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("lowest", "highest"), [(120, 126), (5, 250)])
def test_what_is_in_mxfp4_keeps_its_numbers(dtype: torch.dtype, lowest: int, highest: int) -> None:
    numbers = packed(4, 96, lowest=lowest, highest=highest).widen(dtype)
    again = Mxfp4.of(numbers)
    assert again is not None and torch.equal(again.widen(dtype), numbers)
    assert again.nbytes * 8 == numbers.numel() * 4.25


def test_codes_stand_for_what_the_specification_says() -> None:
    codes = torch.tensor([[[low | low + 1 << 4 for low in range(0, 16, 2)] * 2]], dtype=torch.uint8)
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    widened = Mxfp4(codes, torch.tensor([[[128]]], dtype=torch.uint8)).widen(torch.float32)
    assert widened.flatten().tolist() == [2 * number for number in numbers] * 2


@pytest.mark.parametrize("spoil", [5.0, 7.0, 0.3, float("nan"), float("inf")])
def test_other_numbers_are_not_taken_for_mxfp4(spoil: float) -> None:
    numbers = torch.ones(1, 2, 32)
    numbers[0, 1, :2] = torch.tensor([4.0, spoil])
    assert Mxfp4.of(numbers) is None
    assert Mxfp4.of(torch.ones(1, 2, 40)) is None, "a scale is of 32 numbers"


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("gate", [None, Gate(), OF_GPT_OSS], ids=str)
@pytest.mark.parametrize(("num_tokens", "depth"), [(1, 160), (23, 64)])
def test_products_with_packed_weights_are_those_with_their_numbers(
    num_tokens: int, depth: int, gate: Gate | None, rows: int
) -> None:
    weight = packed(2 * 40 if gate else 72, depth)
    full = weight.widen(torch.float16)
    bias = None if gate == Gate() else torch.randn(full.shape[:2], device=DEVICE, dtype=torch.float16)
    ids = torch.rand(num_tokens, NUM_EXPERTS, device=DEVICE).topk(2, -1).indices.int()
    x = torch.randn(num_tokens if gate else 2 * num_tokens, depth, device=DEVICE, dtype=torch.float16)
    plan = plan_blocks(ids, NUM_EXPERTS, rows)
    out = packed_product(x, Packed.of(weight), bias, plan, 2 if gate else 1, gate)
    expected: Tensor = gate_up(x, full, bias, plan, 2, gate, TILE) if gate else down(x, full, bias, plan, TILE)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


def test_words_take_the_bits_of_their_codes_and_whole_blocks() -> None:
    words = Packed.of(packed(6, 160))
    assert words.words.shape == (NUM_EXPERTS, 2, 6, 32) and words.multipliers.shape == (NUM_EXPERTS, 2, 6)
    assert Packed.of(packed(6, 128)).nbytes == packed(6, 128).nbytes


def test_a_scale_that_kernels_cannot_read_is_refused_with_both_sizes() -> None:
    Packed.of(packed(2, 32, lowest=0, highest=129))
    with pytest.raises(ValueError, match=r"a scale of 2\*\*2; kernels read up to 2\*\*1"):
        Packed.of(packed(2, 32, lowest=129, highest=130))


def test_what_is_too_small_for_float16_is_nothing_there() -> None:
    weight = packed(40, 64, lowest=0, highest=2)
    x, ids = torch.ones(1, 64, device=DEVICE, dtype=torch.float16), torch.zeros(1, 1, device=DEVICE, dtype=torch.int32)
    out = packed_product(x, Packed.of(weight), None, plan_blocks(ids, NUM_EXPERTS, 16), 1, None)
    assert not out.any()
