"""Keys and values rounded to FP8: what comes back of what was written, and whose bytes change."""

import pytest
import torch
from torch import Tensor

from deployments.engine.kernels.fp8_kv import round_heads, widen_heads
from deployments.engine.kv.cache import KVCache, KVShape
from deployments.kv_groups import KVGroup

CPU = torch.device("cpu")
SHAPE = KVShape((KVGroup((0, 1), 3, 8),), torch.bfloat16, is_fp8=True)


def rounded(numbers: Tensor) -> Tensor:
    return widen_heads(*round_heads(numbers), numbers.dtype)


def test_a_number_moves_by_a_sixteenth_of_itself_at_most_and_the_largest_not_at_all() -> None:
    numbers = torch.randn(1000, 64) * torch.logspace(-20, 20, 1000).unsqueeze(1)
    largest = numbers.abs().amax(-1, keepdim=True)
    least = largest * 2.0**-14  # below it codes lie at equal distances
    moved = (rounded(numbers) - numbers).abs()
    assert (moved <= torch.maximum(numbers.abs(), least) / 15.99).all()
    assert (moved[numbers.abs() == largest] <= 1e-6 * largest[:, 0]).all()


@pytest.mark.parametrize(
    ("largest", "scale"), [(448.0, 1.0), (896.0, 2.0), (3e38, 3e38 / 448), (1e-38, 2.0**-100), (0.0, 2.0**-100)]
)
def test_the_scale_makes_the_largest_number_the_largest_code(largest: float, scale: float) -> None:
    codes, scales = round_heads(torch.tensor([[0.0, -largest]]))
    assert scales.tolist() == pytest.approx([scale])
    assert codes[0].tolist() == [0.0, -448.0 if largest > 1e-30 else 0.0]


def test_blocks_hold_what_was_written_wherever_they_are_copied() -> None:
    source, target = (KVCache(SHAPE, 5, 4, CPU) for _ in range(2))
    keys, values = torch.randn(2, 6, 3, 8).bfloat16()
    slots = torch.tensor([4, 5, 6, 7, 16, 17])  # all of block 1, half of block 4
    stored = source.write(1, slots, keys, values)
    assert torch.equal(stored[0], rounded(keys)) and torch.equal(stored[1], rounded(values))
    chunk = torch.empty(source.chunk_shape(2), dtype=torch.uint8)
    source.export_blocks([1, 4], chunk)
    target.import_blocks([3, 0], chunk)
    for cache, ids in ((source, [1, 4]), (target, [3, 0])):
        for part, expected in zip(cache.gather(1, torch.tensor(ids)), stored, strict=True):
            assert torch.equal(part.flatten(0, 1)[:6], expected)
            assert not part.flatten(0, 1)[6:].any()
        assert not cache.blocks[0].any()


def test_kernels_find_codes_and_scales_where_they_were_written() -> None:
    cache = KVCache(SHAPE, 5, 4, CPU)
    keys, values = cache.write(0, torch.tensor([13]), *torch.randn(2, 1, 3, 8).bfloat16())
    kv = cache.paged(0)
    assert kv.key_scales is not None and kv.value_scales is not None
    for codes, scales, expected in ((kv.keys, kv.key_scales, keys), (kv.values, kv.value_scales, values)):
        assert torch.equal((codes[3, 1].float() * scales[3, :, 1:2]).bfloat16(), expected[0])
