"""A GPU's runners on a CPU: graphs run their steps anew, attention is plain torch. Imported where Triton is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.interpreted import DEVICE  # before what needs Triton

if DEVICE.type == "cuda":
    pytest.skip("there is a GPU: tests/gpu has the runner itself", allow_module_level=True)

from deployments.engine.attention.base import LayerAttention
from deployments.engine.attention.cuda import Prompts
from deployments.engine.execution import cuda, cuda_heads, verification
from deployments.engine.kernels.arguments import PagedKV, Scores
from deployments.engine.kernels.cuda_verification import Runs
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from tests.gpu.expected import expected_attention

# Under its first `torch.device` torch takes down, for the whole process, which functions place tensors. Those that
# stand in for them below must not be what it finds, or nothing is ever built on "meta" by the real ones again.
with torch.device("meta"):
    torch.empty(0)


class PlainStep:
    """As `CudaStep`; reads what a graph would read, when it would: lengths, tables and starts are tensors."""

    def __init__(
        self,
        cache: KVCache,
        slots: Tensor,
        single_tables: tuple[Tensor, ...],
        single_lens: Tensor,
        prompts: tuple[Prompts, ...] = (),
        rows: Tensor | None = None,
        watch: LayerWatch | None = None,
    ) -> None:
        self._cache, self._slots, self.rows, self._watch = cache, slots, rows, watch
        self._lens, self._tables = single_lens.tolist(), single_tables
        self._prompts = prompts

    def attend(self, asked: LayerAttention) -> Tensor:
        layer, queries, keys, values, scores, _ = asked
        queries, keys, values = (part.transpose(0, 1) for part in (queries, keys, values))
        group = self._cache.group_of[layer]
        slots = self._slots[group]
        written = slots >= 0
        self._cache.write(layer, slots[written].long(), keys[written], values[written])
        if self._watch is not None and layer + 1 in self._watch.ends:
            self._watch.reach(layer + 1)
        out = torch.zeros_like(queries)
        for row, (length, table) in enumerate(zip(self._lens, self._tables[group], strict=True)):
            if length:
                out[row] = self._attend_paged(layer, queries[row : row + 1], length, table, scores)[0]
        for prompts in self._prompts:
            for number in range(len(prompts.starts) - 1):
                first, end = (prompts.starts[number : number + 2] + prompts.start).tolist()
                span = slice(first, end)
                if prompts.tables is None:
                    out[span] = expected_attention(queries[span], keys[span], values[span], scores)
                elif end > first:
                    assert prompts.lens is not None
                    length, table = int(prompts.lens[number]), prompts.tables[group][number]
                    out[span] = self._attend_paged(layer, queries[span], length, table, scores)
        return out

    def _attend_paged(self, layer: int, queries: Tensor, length: int, table: Tensor, scores: Scores) -> Tensor:
        blocks = table[: -(-length // self._cache.block_size)]
        keys, values = (part.flatten(0, 1)[:length] for part in self._cache.gather(layer, blocks))
        return expected_attention(queries, keys, values, scores)


class PlainVerificationStep:
    """As `VerificationStep`, likewise."""

    rows = None

    def __init__(self, cache: KVCache, slots: Tensor, tables: tuple[Tensor, ...], runs: Runs) -> None:
        prompts = Prompts(0, slots.shape[1], runs.max_queries, 0, runs.starts, (), lens=runs.lens, tables=tables)
        nothing = tuple(table[:0] for table in tables)
        self._step = PlainStep(cache, slots, nothing, runs.lens[:0], (prompts,))

    def attend(self, asked: LayerAttention) -> Tensor:
        return self._step.attend(asked)


class FakeGraph:
    """Runs again what was recorded, into the same output."""

    def __init__(self) -> None:
        self._run: Callable[[], Tensor | None] | None = None
        self._out: Tensor | None = None

    def record(self, run: Callable[[], Tensor | None]) -> Tensor | None:
        self._run, self._out = run, run()
        return self._out

    @torch.inference_mode()
    def replay(self) -> None:
        assert self._run is not None
        out = self._run()
        if self._out is not None and out is not None:
            self._out.copy_(out)

    def pool(self) -> tuple[int, int]:
        return 0, 0


class FakeEvent:
    def record(self) -> None:
        """Nothing is under way."""

    synchronize = record


def plain_write(asked: LayerAttention, kv: PagedKV, slots: Tensor, *, keeps: bool) -> None:
    """As `attention.cuda.write`, of what is rotated."""
    assert asked.rotation is None and not keeps
    written = slots >= 0
    for pool, new in ((kv.keys, asked.keys), (kv.values, asked.values)):
        pool.view(-1, *pool.shape[2:])[slots[written].long()] = new.transpose(0, 1)[written]


def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the runners of a GPU run here."""
    allocate = torch.empty

    def empty(*size: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return allocate(*size, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    memory = SimpleNamespace(memory_clock_rate=2_619_000, memory_bus_width=5_120)  # an H100's
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    for module in (cuda, cuda_heads):
        monkeypatch.setattr(module, "CudaStep", PlainStep)
    monkeypatch.setattr(cuda_heads, "write", plain_write)
    monkeypatch.setattr(verification, "VerificationStep", PlainVerificationStep)
    for module in (cuda, cuda_heads, verification):
        monkeypatch.setattr(module, "record", lambda graph, run, pool: graph.record(run))
