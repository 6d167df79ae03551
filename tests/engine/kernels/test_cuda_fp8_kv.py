"""Keys and values in FP8 beside plain torch: written and read by kernels, on a GPU or else in Triton's interpreter.

Where the interpreter makes codes of numbers it does not round to even, nor at all below the least normal code, and
forgets to carry what it rounds up to a power of 2. It has no bfloat16 products: float16 stands in.
"""

import pytest
import torch
from torch import Tensor

from deployments.engine.kernels.arguments import HeadNorms, PagedKV, Rotation, Scores
from deployments.engine.kernels.fp8_kv import round_heads
from deployments.engine.kv.cache import KVCache, KVShape
from deployments.kv_groups import KVGroup
from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels.cuda_attention import decode_attention, decode_tile  # isort: skip
from deployments.engine.kernels.cuda_fp8_kv import rotate_and_round, widen_blocks  # isort: skip
from deployments.engine.kernels.cuda_prefill import prefill_attention  # isort: skip
from deployments.engine.kernels.cuda_rotary import rotate_and_write  # isort: skip
from deployments.engine.kernels.cuda_splits import plan_splits  # isort: skip

BLOCK_SIZE, NUM_BLOCKS = 128, 7
HEADS = [(4, 2, 16), (3, 1, 24)]
every_shape_of_heads = pytest.mark.parametrize("heads", HEADS, ids=str)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What other tests have drawn before is of no account."""
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float16)


def as_int32(values: list[int]) -> Tensor:
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


def build_cache(num_kv_heads: int, head_dim: int) -> KVCache:
    """Two layers of which the second is used; random bytes would be no numbers."""
    shape = KVShape((KVGroup((0, 1), num_kv_heads, head_dim),), torch.float16, is_fp8=True)
    return KVCache(shape, NUM_BLOCKS, BLOCK_SIZE, DEVICE)


def filled(num_kv_heads: int, head_dim: int) -> tuple[KVCache, Tensor, Tensor]:
    """A pool, and its keys and values, (all slots, H_kv, head_dim); tokens differ in size by far."""
    cache = build_cache(num_kv_heads, head_dim)
    slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE, device=DEVICE)
    sizes = torch.exp2(torch.randint(-6, 3, (2, len(slots), num_kv_heads, 1), device=DEVICE))
    keys, values = randn(2, len(slots), num_kv_heads, head_dim) * sizes.half()
    return cache, *cache.write(1, slots, keys, values)


@pytest.mark.parametrize("rotated", ["all", "all, and norms", "a part", "none"])
@pytest.mark.parametrize("heads", [*HEADS, (20, 10, 32)], ids=str)
def test_what_is_written_is_what_is_kept(heads: tuple[int, int, int], rotated: str) -> None:
    num_heads, num_kv_heads, head_dim = heads
    sizes = [count * head_dim for count in (num_heads, num_kv_heads, num_kv_heads)]
    parts = randn(4, sum(sizes)).split(sizes, -1)
    queries, keys, values = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    values[1, 0] = 0
    rotation = None
    if rotated != "none":
        num_dims = 8 if rotated == "a part" else head_dim
        angles = torch.randn(1, 4, num_dims // 2, device=DEVICE)
        norms = HeadNorms(randn(head_dim), randn(head_dim), 1e-6) if rotated == "all, and norms" else None
        rotation = Rotation(angles.cos().half(), angles.sin().half(), num_dims, norms)
    slots = torch.tensor([3, 2 * BLOCK_SIZE + 5, -1, 7 * BLOCK_SIZE - 1], device=DEVICE)
    plain = torch.zeros(2, NUM_BLOCKS * BLOCK_SIZE, num_kv_heads, head_dim, device=DEVICE).half()
    pools = plain[0], plain[1]
    expected, expected_keys = rotate_and_write(queries, keys, values, rotation, *pools, slots, keep_keys=True)
    assert expected_keys is not None
    cache = build_cache(num_kv_heads, head_dim)
    out, new_keys, new_values = rotate_and_round(queries, keys, values, rotation, cache.paged(1), slots, keep=True)
    assert torch.equal(out, expected) and new_keys is not None
    check_rounded(new_keys, expected_keys)
    check_rounded(new_values, values)
    written = slots[slots >= 0]
    for part, kept in zip(
        cache.gather(1, torch.arange(NUM_BLOCKS, device=DEVICE)), (new_keys, new_values), strict=True
    ):
        stored = part.flatten(0, 1)
        assert torch.equal(stored[written], kept[slots >= 0])
        stored[written] = 0
        assert not stored.any(), "padding was written"
    assert not cache.blocks[0].any(), "another layer was written"


def check_rounded(actual: Tensor, numbers: Tensor) -> None:
    codes, scales = round_heads(numbers)
    expected = (codes.float() * scales.unsqueeze(-1)).half().float()
    wrong = actual.float() != expected
    if DEVICE.type == "cpu":
        # As far as float16 tells: to 2^-24, or 2^-10 of a number; codes are 2^-4 of it and more away from each other.
        told = numbers.abs().float() * 2.0**-10 + 2.0**-24
        farther = (actual.float() - numbers).abs() - (expected - numbers).abs()
        wrong &= farther.abs() > told
        wrong &= (actual.float() - expected).abs() > scales.unsqueeze(-1) * 2.0**-9 + told
        wrong &= (actual.float() != expected / 2) | (torch.frexp(codes.float()).mantissa.abs() != 0.5)
    assert not wrong.any()


@every_shape_of_heads
def test_blocks_are_widened_as_plain_torch_does_it(heads: tuple[int, int, int]) -> None:
    cache, keys, values = filled(*heads[1:])
    ids = torch.tensor([5, 0, 2], device=DEVICE)
    kv = cache.paged(1)
    for codes, scales, numbers in ((kv.keys, kv.key_scales, keys), (kv.values, kv.value_scales, values)):
        assert scales is not None
        widened = widen_blocks(codes, scales, ids, torch.float16)
        assert torch.equal(widened, numbers.view(NUM_BLOCKS, BLOCK_SIZE, *numbers.shape[1:])[ids])


@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [(None, None, False), (50, None, True), (None, 2.0, False), (90, 2.0, True)],
)
@every_shape_of_heads
def test_decodes_attend_what_codes_stand_for(
    heads: tuple[int, int, int], window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    cache, keys, values = filled(num_kv_heads, head_dim)
    scores = Scores(0.01 * head_dim**-0.5, window, softcap, randn(num_heads) if has_sinks else None)
    # Products with codes that would leave float16 must not.
    queries = 100 * randn(3, num_heads, head_dim)
    tables, lens = as_int32([5, 1, 3, 0, 6, 6]).view(3, 2), as_int32([200, 0, 1])
    plain = PagedKV(*(part.view(NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim) for part in (keys, values)))
    expected, actual = (
        decode_attention(queries, kv, tables, plan_splits(lens, num_kv_heads, tile, 2 * BLOCK_SIZE, window), scores)
        for kv, tile in (
            (plain, decode_tile(head_dim, 3 * num_kv_heads)),
            (cache.paged(1), decode_tile(head_dim, 3 * num_kv_heads, is_fp8=True)),
        )
    )
    check(actual, expected)


@pytest.mark.parametrize(("window", "softcap", "has_sinks"), [(None, None, False), (50, None, True), (90, 2.0, False)])
@every_shape_of_heads
def test_prompts_attend_what_codes_of_their_context_stand_for(
    heads: tuple[int, int, int], window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    cache, keys, values = filled(num_kv_heads, head_dim)
    scores = Scores(head_dim**-0.5, window, softcap, randn(num_heads) if has_sinks else None)
    queries = randn(9, num_heads, head_dim)
    starts, lens, tables = as_int32([0, 7, 9]), as_int32([240, 130]), as_int32([5, 1, 3, 0]).view(2, 2)
    plain = PagedKV(*(part.view(NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim) for part in (keys, values)))
    expected, actual = (
        prefill_attention(queries, kv, starts, 7, scores, lens=lens, tables=tables) for kv in (plain, cache.paged(1))
    )
    # Widened before they are multiplied, nothing differs; compiled, the two kernels add up in orders of their own.
    check(actual, expected, 0 if DEVICE.type == "cpu" else 1e-3)


def test_queries_behind_the_last_sequence_are_padding() -> None:
    keys, values = randn(2, 4, 64, 1, 16)
    queries, tables = randn(9, 2, 16), as_int32([3, 1]).view(1, 2)
    given, scores = (queries, PagedKV(keys, values)), Scores(0.25)
    lens, starts = as_int32([90]), as_int32([0, 5])
    padded = prefill_attention(*given, starts, 9, scores, lens=lens, tables=tables, is_padded=True)
    expected = prefill_attention(queries[:5], given[1], starts, 5, scores, lens=lens, tables=tables)
    assert torch.equal(padded[:5], expected) and not padded[5:].any()


def check(actual: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    assert (actual.float() - expected.float()).norm() <= tolerance * expected.float().norm()
