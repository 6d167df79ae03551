"""Attention of a step on a GPU, of every mixture of decodes and prompts, against plain torch in float32."""

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.attention import flash3  # noqa: E402
from deployments.engine.attention.base import LayerAttention  # noqa: E402
from deployments.engine.attention.cuda import LONG_CHUNK, CudaStep, Prompts  # noqa: E402
from deployments.engine.kernels.arguments import Scores  # noqa: E402
from deployments.engine.kernels.fp8_kv import round_heads, widen_heads  # noqa: E402
from deployments.engine.kv.cache import KVCache, KVShape  # noqa: E402
from deployments.kv_groups import KVGroup  # noqa: E402
from tests.gpu.expected import expected_attention  # noqa: E402

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
        monkeypatch.setattr(flash3, "can_attend", lambda *_: False)
    elif not flash3.can_attend(torch.bfloat16, 128, Scores(1.0)):
        pytest.skip("FlashAttention 3 is not installed, or this is not a Hopper GPU")


class Step:
    """A step over a pool that is filled with random KV, and what must come out of it.

    Args:
        decodes: (computed, new) tokens of the sequences that decode.
        groups: the same of prompts that attend together.
        heads: of the queries and of the keys, and their dimensions.
        window: of the layer.
        softcap: of the layer.
        has_sinks: whether the layer has them.
        is_fp8: whether keys and values are rounded.
    """

    def __init__(
        self,
        decodes: list[tuple[int, int]],
        groups: list[list[tuple[int, int]]],
        heads: tuple[int, int, int],
        window: int | None = None,
        softcap: float | None = None,
        has_sinks: bool = False,
        is_fp8: bool = False,
    ) -> None:
        num_heads, self.num_kv_heads, self.head_dim = heads
        head_dim = self.head_dim
        sinks = randn(num_heads) if has_sinks else None
        self.scores = Scores(head_dim**-0.5, window, softcap, sinks)
        shape = KVShape((KVGroup((0,), self.num_kv_heads, head_dim),), torch.bfloat16, is_fp8)
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
        on_gpu = as_int32(self.slots)[None], (pad(tables) if tables else as_int32([]).view(0, 0),), lens
        self.step = CudaStep(self.cache, *on_gpu, tuple(prompts))

    def add(self, computed: int, new: int) -> list[int]:
        total = computed + new
        keys, values = randn(2, total, self.num_kv_heads, self.head_dim)
        queries = randn(new, self.num_heads, self.head_dim)
        table = [self.free.pop() for _ in range(-(-total // BLOCK_SIZE))]
        slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(total)]
        before = torch.tensor(slots[:computed], device="cuda", dtype=torch.int64)
        self.cache.write(0, before, keys[:computed], values[:computed])
        self.slots += slots[computed:]
        self.new.append((queries, keys[computed:], values[computed:]))
        if self.cache.is_fp8:
            keys, values = (widen_heads(*round_heads(part), torch.bfloat16) for part in (keys, values))
        self.expected.append(expected_attention(queries, keys, values, self.scores))
        return table

    def group(self, start: int, sequences: list[tuple[int, int]]) -> Prompts:
        tables = [self.add(*sequence) for sequence in sequences]
        counts = [new for _, new in sequences]
        totals = [computed + new for computed, new in sequences]
        shape = start, sum(counts), max(counts), max(totals)
        starts = as_int32([0, *torch.tensor(counts).cumsum(0).tolist()])
        if not sequences[0][0]:
            return Prompts(*shape, starts, tuple(sequences))
        table = pad(tables)
        capacities = as_int32([i * table.shape[1] * BLOCK_SIZE for i in range(len(tables) + 1)])
        return Prompts(*shape, starts, tuple(sequences), as_int32(totals), capacities, (table,))

    def attend(self) -> Tensor:
        queries, keys, values = (torch.cat(parts).transpose(0, 1) for parts in zip(*self.new, strict=True))
        with torch.inference_mode():
            return self.step.attend(LayerAttention(0, queries, keys, values, self.scores, None))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def as_int32(values: list[int]) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def pad(tables: list[list[int]]) -> Tensor:
    width = max(map(len, tables))
    return as_int32([block for table in tables for block in table + [0] * (width - len(table))]).view(-1, width)


MIXTURES = {
    "whole": ([], [WHOLE]),
    "one whole": ([], [[(0, 2000)]]),
    "long chunk": ([], [[LONG]]),
    "short chunks": ([], [SHORT]),
    "even chunks": ([], [[(256, 100), (256, 100), (700, 9)]]),
    "chunks": ([], [[(1280, LONG_CHUNK)], [LONG], SHORT]),
    "decodes and whole": (DECODES, [WHOLE]),
    "all": (DECODES, [WHOLE, SHORT, [LONG], [(0, 700)]]),
}
Sequences = list[tuple[int, int]]


@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 2, 64)], ids=str)
@pytest.mark.parametrize(("decodes", "groups"), MIXTURES.values(), ids=MIXTURES)
def test_each_sequence_attends_its_own_past(
    kernel: None, decodes: Sequences, groups: list[Sequences], heads: tuple[int, int, int]
) -> None:
    check(Step(decodes, groups, heads))


@pytest.mark.parametrize(
    "heads", [(8, 8, 64), (6, 2, 80), (4, 2, 96), (16, 1, 128), (4, 1, 192), (16, 8, 256)], ids=str
)
@pytest.mark.parametrize("mixture", ["one whole", "all"])
def test_heads_of_other_sizes(kernel: None, mixture: str, heads: tuple[int, int, int]) -> None:
    check(Step(*MIXTURES[mixture], heads))


@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 128), (6, 2, 80), (4, 2, 256)], ids=str)
@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [
        (1, None, False),
        (100, None, False),
        (1000, None, True),
        (2500, 2.0, True),
        (None, 2.0, False),
        (None, None, True),
    ],
)
@pytest.mark.parametrize("mixture", ["one whole", "long chunk", "even chunks", "all"])
def test_windows_softcaps_and_sinks(
    kernel: None,
    mixture: str,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    heads: tuple[int, int, int],
) -> None:
    check(Step(*MIXTURES[mixture], heads, window, softcap, has_sinks))


@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 2, 64), (6, 2, 80), (16, 8, 256)], ids=str)
@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"), [(None, None, False), (100, None, True), (2500, 2.0, False)]
)
@pytest.mark.parametrize("mixture", ["one whole", "chunks", "all"])
def test_all_see_rounded_keys_and_values_their_own_as_well(
    kernel: None,
    mixture: str,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    heads: tuple[int, int, int],
) -> None:
    check(Step(*MIXTURES[mixture], heads, window, softcap, has_sinks, is_fp8=True))


def check(step: Step) -> None:
    at, out = 0, step.attend().float()
    for expected in step.expected:
        actual = out[at : at + len(expected)]
        difference = (actual - expected).norm() / expected.norm()
        assert difference < TOLERANCE, f"rows {at} to {at + len(expected)}: relative difference {difference:.2e}"
        at += len(expected)
    assert at == len(out)
