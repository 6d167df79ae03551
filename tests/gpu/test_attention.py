"""Attention of a step on a GPU, of every mixture of decodes and prompts, against plain torch in float32."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.attention import flash3  # noqa: E402
from deployments.engine.attention.cuda import LONG_CHUNK, CudaStep, Prompts  # noqa: E402
from deployments.engine.kv_cache import KVCache, KVShape  # noqa: E402

BLOCK_SIZE, NUM_BLOCKS = 256, 48
TOLERANCE = 5e-3
# (tokens computed before, new tokens)
DECODES = [(700, 1), (5, 1)]
WHOLE = [(0, 300), (0, 2), (0, 1025)]
SHORT = [(256, 100), (3000, 37)]
LONG = (2816, LONG_CHUNK + 100)


@pytest.fixture(params=["flash3", "flash2"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "flash2":
        monkeypatch.setattr(flash3, "can_attend", lambda dtype, head_dim: False)
    elif not flash3.can_attend(torch.bfloat16, 128):
        pytest.skip("FlashAttention 3 is not installed, or this is not a Hopper GPU")


class Step:
    """A step over a pool that is filled with random KV, and what must come out of it.

    Args:
        decodes: (computed, new) tokens of the sequences that decode.
        groups: the same of prompts that attend together.
        num_heads: of the queries; a quarter of it of keys.
        head_dim: of all.
    """

    def __init__(
        self, decodes: list[tuple[int, int]], groups: list[list[tuple[int, int]]], num_heads: int, head_dim: int
    ) -> None:
        self.num_kv_heads, self.head_dim, self.scaling = num_heads // 4, head_dim, head_dim**-0.5
        shape = KVShape(1, self.num_kv_heads, head_dim, torch.bfloat16)
        self.cache = KVCache(shape, NUM_BLOCKS, BLOCK_SIZE, torch.device("cuda"))
        self.free = torch.randperm(NUM_BLOCKS).tolist()
        self.expected: list[Tensor] = []
        self.new: list[tuple[Tensor, Tensor, Tensor]] = []
        self.slots: list[int] = []
        self.num_heads = num_heads
        tables = [self.add(*sequence) for sequence in decodes]
        start, prompts = len(decodes), []
        for group in groups:
            prompts.append(self.group(start, group))
            start += sum(new for _, new in group)
        lens = as_int32([computed + new for computed, new in decodes])
        on_gpu = as_int32(self.slots), pad(tables) if tables else as_int32([]).view(0, 0), lens
        self.step = CudaStep(self.cache, *on_gpu, tuple(prompts))

    def add(self, computed: int, new: int) -> list[int]:
        total = computed + new
        keys, values = randn(2, total, self.num_kv_heads, self.head_dim)
        queries = randn(new, self.num_heads, self.head_dim)
        table = [self.free.pop() for _ in range(-(-total // BLOCK_SIZE))]
        slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(total)]
        for pool, part in zip(self.cache.blocks[0], (keys, values), strict=True):
            pool.view(-1, *pool.shape[2:])[slots[:computed]] = part[:computed]
        self.slots += slots[computed:]
        self.new.append((queries, keys[computed:], values[computed:]))
        key, value = (part.float().repeat_interleave(4, 1) for part in (keys, values))
        mask = torch.ones(new, total, device="cuda", dtype=torch.bool).tril(computed)
        scores = torch.einsum("qhd,khd->hqk", queries.float(), key) * self.scaling
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        self.expected.append(torch.einsum("hqk,khd->qhd", weights, value))
        return table

    def group(self, start: int, sequences: list[tuple[int, int]]) -> Prompts:
        tables = [self.add(*sequence) for sequence in sequences]
        counts = [new for _, new in sequences]
        totals = [computed + new for computed, new in sequences]
        shape = start, sum(counts), max(counts), max(totals)
        starts = as_int32([0, *torch.tensor(counts).cumsum(0).tolist()])
        if not sequences[0][0]:
            return Prompts(*shape, starts)
        table = pad(tables)
        capacities = as_int32([i * table.shape[1] * BLOCK_SIZE for i in range(len(tables) + 1)])
        return Prompts(*shape, starts, as_int32(totals), capacities, table)

    def attend(self) -> Tensor:
        queries, keys, values = (torch.cat(parts).transpose(0, 1) for parts in zip(*self.new, strict=True))
        cos = torch.ones(1, queries.shape[1], self.head_dim, device="cuda", dtype=torch.bfloat16)
        rotary = cos, torch.zeros_like(cos)
        with torch.inference_mode():
            return self.step.attend(
                0, queries, keys, values, scaling=self.scaling, sliding_window=None, softcap=None, rotary=rotary
            )


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def as_int32(values: list[int]) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def pad(tables: list[list[int]]) -> Tensor:
    width = max(map(len, tables))
    return as_int32([block for table in tables for block in table + [0] * (width - len(table))]).view(-1, width)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(32, 128), (8, 64)])
@pytest.mark.parametrize(
    ("decodes", "groups"),
    [
        ([], [WHOLE]),
        ([], [[(0, 2000)]]),
        ([], [[LONG]]),
        ([], [SHORT]),
        ([], [[(256, 100), (256, 100), (700, 9)]]),
        ([], [[(1280, LONG_CHUNK)], [LONG], SHORT]),
        (DECODES, [WHOLE]),
        (DECODES, [WHOLE, SHORT, [LONG], [(0, 700)]]),
    ],
    ids=["whole", "one whole", "long chunk", "short chunks", "even chunks", "chunks", "decodes and whole", "all"],
)
def test_each_sequence_attends_its_own_past(
    kernel: None, decodes: list[tuple[int, int]], groups: list[list[tuple[int, int]]], num_heads: int, head_dim: int
) -> None:
    step = Step(decodes, groups, num_heads, head_dim)
    at, out = 0, step.attend().float()
    for expected in step.expected:
        actual = out[at : at + len(expected)]
        difference = (actual - expected).norm() / expected.norm()
        assert difference < TOLERANCE, f"rows {at} to {at + len(expected)}: relative difference {difference:.2e}"
        at += len(expected)
    assert at == len(out)
