"""Kernels on a GPU against plain torch in float32, in shapes that do not fit their tiles as well."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.kernels import cpu_sampling, cuda_sampling  # noqa: E402
from deployments.engine.kernels.arguments import PagedKV, Rotation, Scores  # noqa: E402
from deployments.engine.kernels.cuda import add_norm, gelu_mul, rms_norm, silu_mul  # noqa: E402
from deployments.engine.kernels.cuda_attention import decode_attention, decode_tile  # noqa: E402
from deployments.engine.kernels.cuda_matmul import add_linear, linear  # noqa: E402
from deployments.engine.kernels.cuda_rotary import rotate_and_write  # noqa: E402
from deployments.engine.kernels.cuda_splits import plan_splits  # noqa: E402
from tests.gpu.expected import expected_attention  # noqa: E402

BLOCK_SIZE = 256


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check(actual: Tensor, expected: Tensor, tolerance: float = 5e-3) -> None:
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-9)
    assert difference < tolerance, f"relative difference {difference:.2e}"


@pytest.mark.parametrize("shape", [(1, 4096), (7, 1, 576), (300, 128), (3, 1000)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape), randn(shape[-1])
    value = x.float()
    expected = weight * (value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    check(rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_of_heads_within_rows_that_lie_apart() -> None:
    heads, weight = randn(1, 7, 10 * 128)[..., 128:512].unflatten(-1, (3, 128)), randn(128)
    assert torch.equal(rms_norm(heads, weight, 1e-6), rms_norm(heads.contiguous(), weight, 1e-6))


def test_rms_norm_keeps_the_heads_of_a_token_beside_each_other() -> None:
    heads, weight = randn(1, 7, 3, 128).transpose(1, 2), randn(128)
    out = rms_norm(heads, weight, 1e-6)
    assert out.stride() == heads.stride()
    assert torch.equal(out, rms_norm(heads.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("shape", [(1, 3584), (300, 128), (3, 1000)])
def test_rms_norm_with_a_weight_in_float32_rounds_once(shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape), randn(shape[-1], dtype=torch.float32)
    assert torch.equal(rms_norm(x, weight, 1e-5), normed(x, weight)), "as transformers' Gemma rounds"


def normed(x: Tensor, weight: Tensor) -> Tensor:
    value = x.float()
    return (value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)


@pytest.mark.parametrize("shape", [(1, 1, 3584), (1, 300, 128)])
def test_what_stands_between_two_blocks(shape: tuple[int, ...]) -> None:
    (x, residual), (weight, following) = randn(2, *shape), randn(2, shape[-1], dtype=torch.float32)
    expected = residual + normed(x, weight)
    for next_weight in (following, None):
        total = residual.clone()
        out = add_norm(total, x, weight, 1e-5, next_weight, 1e-5)
        check(total, expected, 1e-3)
        if next_weight is None:
            assert out is None
        else:
            assert out is not None
            check(out, normed(expected, following), 1e-3)


@pytest.mark.parametrize("shape", [(1, 2), (5, 6144), (2, 3, 200)])
def test_gated_activations(shape: tuple[int, ...]) -> None:
    x = 3 * randn(*shape)
    gate, up = x.float().chunk(2, -1)
    check(silu_mul(x), functional.silu(gate) * up)
    check(gelu_mul(x), functional.gelu(gate, approximate="tanh") * up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("num_columns", "depth"), [(4096, 4096), (1000, 1032), (1024, 3072), (20000, 512), (6144, 1024)]
)
@pytest.mark.parametrize("num_rows", [1, 2, 8, 17, 32, 33, 64, 65])
def test_products(num_rows: int, num_columns: int, depth: int, has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = randn(num_rows, depth, dtype=dtype), randn(num_columns, depth, dtype=dtype) / depth**0.5
    bias = randn(num_columns, dtype=dtype) if has_bias else None
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    check(linear(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_columns", "depth"), [(4096, 4096), (1000, 1032), (20000, 512), (1024, 3073)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 17, 32, 33, 65, 300])
def test_products_are_added_in_place(
    num_rows: int, num_columns: int, depth: int, dtype: torch.dtype, has_bias: bool
) -> None:
    x, weight = randn(1, num_rows, depth, dtype=dtype), randn(num_columns, depth, dtype=dtype) / depth**0.5
    residual = randn(1, num_rows, num_columns, dtype=dtype)
    bias = randn(num_columns, dtype=dtype) if has_bias else None
    product = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    expected = residual.float() + product
    out = add_linear(residual, x, weight, bias)
    assert out is residual
    check(out, expected)


@pytest.mark.parametrize("keep_keys", [False, True])
@pytest.mark.parametrize("rotated", ["all", "all, of half a table", "a part", "none"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (5, 1, 80), (16, 8, 256)]
)
def test_rotate_and_write(num_heads: int, num_kv_heads: int, head_dim: int, rotated: str, keep_keys: bool) -> None:
    num_tokens = 11
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    parts = randn(num_tokens, sum(sizes)).split(sizes, -1)
    queries, keys, values = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    rotation = None
    if rotated != "none":
        num_dims = 32 if rotated == "a part" else head_dim
        angles = randn(1, num_tokens, num_dims // 2, dtype=torch.float32)
        copies = 1 if rotated == "all, of half a table" else 2
        cos, sin = (torch.cat([half] * copies, -1).bfloat16() for half in (angles.cos(), angles.sin()))
        rotation = Rotation(cos, sin, num_dims)
    pools = torch.zeros(2, 512, num_kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(511, device="cuda")[:num_tokens]
    slots[3] = -1
    out, kept = rotate_and_write(queries, keys, values, rotation, pools[0], pools[1], slots, keep_keys=keep_keys)
    check(out, rotate(queries, rotation))
    written = slots >= 0
    check(pools[0][slots[written]], rotate(keys, rotation)[written])
    assert torch.equal(pools[1][slots[written]], values[written])
    assert not pools[:, -1].any(), "padding was written"
    if keep_keys:
        assert kept is not None
        check(kept, rotate(keys, rotation))


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    if rotation is None:
        return x
    half = rotation.num_dims // 2
    cos, sin = (table[0, :, None, :half].float() for table in (rotation.cos, rotation.sin))
    a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


@pytest.mark.parametrize(
    "heads",
    [(32, 8, 128), (9, 3, 64), (8, 8, 128), (32, 1, 64), (6, 2, 80), (4, 2, 96), (3, 1, 192), (16, 8, 256)],
    ids=str,
)
@pytest.mark.parametrize(
    "scores",
    [(None, None, False), (100, None, True), (700, 2.0, False), (None, 2.0, True)],
    ids=["plain", "window-sinks", "window-softcap", "softcap-sinks"],
)
@pytest.mark.parametrize(
    "lens",
    [[1], [0, 256], [5, 64, 65, 2000], [320] * 40, [100, 9000], [*range(300, 660, 5), 9000]],
    ids=lambda x: f"{x[:4]}",
)
def test_decode_attention(
    lens: list[int], scores: tuple[int | None, float | None, bool], heads: tuple[int, int, int]
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    window, softcap, has_sinks = scores
    counts = [-(-length // BLOCK_SIZE) for length in lens]
    keys, values = randn(2, sum(counts) + 3, BLOCK_SIZE, num_kv_heads, head_dim)
    ids = torch.randperm(len(keys)).tolist()
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, count in zip(tables, counts, strict=True):
        row[:count] = torch.tensor([ids.pop() for _ in range(count)])
    queries = randn(len(lens), num_heads, head_dim)
    asked = Scores(head_dim**-0.5, window, softcap, randn(num_heads) if has_sinks else None)
    on_gpu = torch.tensor(lens, dtype=torch.int32, device="cuda")
    tile, max_tokens = decode_tile(head_dim, len(lens) * num_kv_heads), tables.shape[1] * BLOCK_SIZE
    splits = plan_splits(on_gpu, num_kv_heads, tile, max_tokens, window)
    out = decode_attention(queries, PagedKV(keys, values), tables.cuda(), splits, asked)
    assert not splits.finished.any(), "the next layer would count on"
    for query, table, length, result in zip(queries, tables, lens, out, strict=True):
        if length == 0:
            assert not result.any()
            continue
        key, value = (part[table.long()].flatten(0, 1)[:length] for part in (keys, values))
        check(result.unsqueeze(0), expected_attention(query.unsqueeze(0), key, value, asked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 128_256), (7, 1000), (3, 151_936), (256, 5)])
def test_scores_of_draws_are_those_of_a_cpu(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    logits = 3 * randn(num_rows, vocab_size, dtype=dtype)
    logits[0, 1] = float("-inf")
    best, temperature = logits.amax(-1), torch.linspace(1e-3, 2, num_rows, dtype=torch.float64)
    keys = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=torch.Generator().manual_seed(5))
    scores = cuda_sampling.gumbel_scores(logits, best, temperature.cuda(), keys.cuda()).cpu()
    on_cpu = logits.float().cpu(), best.float().cpu(), temperature, keys
    expected = cpu_sampling.gumbel_scores(*on_cpu)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(scores.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_draw_from_broken_logits_ends(broken: float) -> None:
    logits = randn(3, 1000)
    logits[0], logits[1, 7] = broken, broken
    bounds = torch.tensor([[1.0] * 3, [5.0] * 3, [0.5] * 3, [0.0] * 3], dtype=torch.float64, device="cuda")
    keys, best = torch.arange(3, device="cuda"), logits.amax(-1)
    scores = cuda_sampling.gumbel_scores(logits, best, bounds[0], keys)
    tokens = cuda_sampling.best_within(scores, logits, best, bounds)
    assert ((tokens >= 0) & (tokens < 1000)).all()
