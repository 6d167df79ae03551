"""Runs scheduled steps on a GPU without ever waiting for it: decodes as CUDA graphs, steps with prompts as they are.

The host prepares a step in pinned memory while the GPU runs the one before. Drawn tokens stay on the GPU, where the
next step finds them; their copies for the host arrive by themselves and are waited for one step later.
"""

import logging
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.attention.cuda import LONG_CHUNK, CudaStep, Prompts
from deployments.engine.batch.build import order_for_batch
from deployments.engine.batch.upload import Span, Upload, Writer
from deployments.engine.config import EngineLimits
from deployments.engine.execution.graphs import (
    MAX_GRAPH_BATCH,
    PROMPT_LENGTHS,
    DecodeGraph,
    MemoryPool,
    PromptGraph,
    ladder,
    padded_batch,
    record,
)
from deployments.engine.kv.cache import KVCache
from deployments.engine.layers.cuda import can_drop_rows
from deployments.engine.model.load import LoadedModel
from deployments.engine.sampling.sampler import build_sampling_batch, compile_draws, sample
from deployments.engine.scheduling.scheduler import ScheduledSequence
from deployments.engine.scheduling.sequence import PENDING

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchedCudaStep:
    """A step that is under way; see `LaunchedStep`."""

    items: list[ScheduledSequence]
    tokens: Tensor
    done: torch.cuda.Event

    def collect(self) -> list[tuple[ScheduledSequence, int | None]]:
        """Wait for the step: each item with the token drawn; None where the prompt is not yet at its end."""
        self.done.synchronize()
        tokens = iter(self.tokens.tolist())
        return [(item, next(tokens) if item.samples else None) for item in self.items]


class CudaRunner:
    """Executes steps of a model whose attention `CudaStep` serves; see `ModelRunner`.

    Args:
        loaded: the model, its layers optimized for a GPU.
        cache: the pool.
        limits: of the engine.
    """

    def __init__(self, loaded: LoadedModel, cache: KVCache, limits: EngineLimits) -> None:
        self._model: PreTrainedModel = loaded.model
        self._device = loaded.device
        self._drops_rows = can_drop_rows(loaded.model)
        self.cache = cache
        self._limits = limits
        self._max_blocks = -(-limits.max_model_len // cache.block_size)
        num_seqs = limits.max_num_seqs
        self._max_graph_batch = min(num_seqs, MAX_GRAPH_BATCH)
        # Two of each: one step is prepared while the copy of the one before may still be read.
        flat = 5 * num_seqs + num_seqs * self._max_blocks
        self._decode_uploads = [Upload(flat) for _ in range(2)]
        self._decode_inputs = torch.zeros(flat, dtype=torch.int32, device=self._device)
        self._decode_inputs[3 * num_seqs : 4 * num_seqs] = -1
        prompt_values = 4 * limits.max_num_batched_tokens + num_seqs * (2 * self._max_blocks + 16) + 64
        self._prompt_uploads = [Upload(prompt_values) for _ in range(2)]
        self._results = [torch.empty(num_seqs, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._drawn = torch.zeros(num_seqs, dtype=torch.int64, device=self._device)
        self._row_of: dict[str, int] = {}
        self._turn = 0
        self._graphs: dict[int, DecodeGraph] = {}
        self._prompt_graphs: dict[int, PromptGraph] = {}
        self._capture()
        compile_draws(loaded.vocab_size, loaded.model.dtype, loaded.device)

    @torch.inference_mode()
    def launch(self, scheduled: list[ScheduledSequence]) -> LaunchedCudaStep:
        """Start a step.

        Args:
            scheduled: at least one run of tokens; pending ones are those that the step before draws.
        """
        self._turn ^= 1
        ordered = order_for_batch(scheduled)
        is_drawn = all(item.num_tokens == 1 and item.samples for item in ordered)
        is_drawn = is_drawn and len(ordered) <= self._max_graph_batch
        if is_drawn:
            logits = self._run_graph(ordered)
        elif self._is_short_prompt(ordered):
            logits = self._run_prompt_graph(ordered[0])
        else:
            logits = self._run_eagerly(ordered)
        sampled = [item for item in ordered if item.samples]
        result = self._results[self._turn][: len(sampled)]
        if sampled:
            sampling = build_sampling_batch(
                [item.sequence.request.sampling for item in sampled], [item.start + item.num_tokens for item in sampled]
            )
            if not (is_drawn and sampling.is_greedy):
                self._drawn[: len(sampled)] = sample(logits[: len(sampled)], sampling)
            result.copy_(self._drawn[: len(sampled)], non_blocking=True)
        self._row_of = {item.sequence.request_id: row for row, item in enumerate(sampled)}
        done = torch.cuda.Event()
        done.record()
        return LaunchedCudaStep(ordered, result, done)

    def _run_graph(self, decodes: list[ScheduledSequence]) -> Tensor:
        graph = self._graphs[padded_batch(len(decodes), self._max_graph_batch)]
        upload = self._decode_uploads[self._turn]
        self._fill_decodes(upload.values, decodes, graph.batch_size)
        upload.to(self._decode_inputs, 5 * self._limits.max_num_seqs + graph.batch_size * self._max_blocks)
        graph.graph.replay()
        return graph.logits

    def _fill_decodes(self, values: np.ndarray, decodes: list[ScheduledSequence], batch_size: int) -> None:
        num_seqs, size, count = self._limits.max_num_seqs, self.cache.block_size, len(decodes)
        token_ids, sources, positions, slots, lens = values[: 5 * num_seqs].reshape(5, num_seqs)
        tables = values[5 * num_seqs :].reshape(num_seqs, self._max_blocks)
        starts = np.fromiter((item.start for item in decodes), np.int32, count)
        token_ids[:count] = [item.sequence.token_ids[item.start] for item in decodes]
        sources[:count] = self._sources(decodes)
        positions[:count] = starts + np.fromiter((item.sequence.position_offset for item in decodes), np.int32, count)
        lens[:count] = starts + 1
        for row, item in zip(tables, decodes, strict=False):
            blocks = item.sequence.block_table
            row[: len(blocks)] = blocks
        slots[:count] = tables[np.arange(count), starts // size] * size + starts % size
        token_ids[count:batch_size] = positions[count:batch_size] = lens[count:batch_size] = 0
        sources[count:batch_size] = slots[count:batch_size] = -1

    def _sources(self, items: Items[ScheduledSequence]) -> list[int]:
        """Row in which the step before drew each item's token; -1 where the token is known."""
        rows = self._row_of
        return [
            rows[item.sequence.request_id] if item.sequence.token_ids[item.start] == PENDING else -1 for item in items
        ]

    def _is_short_prompt(self, ordered: list[ScheduledSequence]) -> bool:
        """Whether one whole prompt runs alone, and a graph is long enough for it."""
        (first, *others) = ordered
        longest = max(self._prompt_graphs, default=0)
        return not others and first.samples and first.start == 0 and 1 < first.num_tokens <= longest

    def _run_prompt_graph(self, item: ScheduledSequence) -> Tensor:
        count, size = item.num_tokens, self.cache.block_size
        graph = self._prompt_graphs[min(length for length in self._prompt_graphs if length >= count)]
        upload = self._prompt_uploads[self._turn]
        flat = upload.values[: 3 * graph.length + 1]
        token_ids, positions, slots = flat[:-1].reshape(3, graph.length)
        token_ids[:count] = item.sequence.token_ids[:count]
        position = np.arange(graph.length)
        positions[:] = position + item.sequence.position_offset
        table = np.asarray(item.sequence.block_table, dtype=np.int32)
        slots[:count] = table[position[:count] // size] * size + position[:count] % size
        token_ids[count:], slots[count:] = 0, -1
        flat[-1] = count - 1
        upload.to(graph.inputs, len(flat))
        graph.graph.replay()
        assert graph.logits is not None
        return graph.logits

    def _run_eagerly(self, ordered: list[ScheduledSequence]) -> Tensor:
        upload = self._prompt_uploads[self._turn]
        writer = Writer(upload.values)
        size = self.cache.block_size
        num_tokens = sum(item.num_tokens for item in ordered)
        token_ids, positions, slots = (writer.take(num_tokens) for _ in range(3))
        decodes = [item for item in ordered if item.num_tokens == 1]
        sources, lens = (writer.take(len(decodes)) for _ in range(2))
        at = 0
        for item in ordered:
            end, span = item.start + item.num_tokens, slice(at, at + item.num_tokens)
            token_ids.array[span] = item.sequence.token_ids[item.start : end]
            position = np.arange(item.start, end, dtype=np.int32)
            positions.array[span] = position + item.sequence.position_offset
            table = np.asarray(item.sequence.block_table, dtype=np.int32)
            slots.array[span] = table[position // size] * size + position % size
            at += item.num_tokens
        sources.array[:] = self._sources(decodes)
        lens.array[:] = [item.start + 1 for item in decodes]
        tables = self._write_tables(writer, decodes)
        last = writer.take(sum(item.samples for item in ordered))
        ends = np.cumsum([item.num_tokens for item in ordered]) - 1
        last.array[:] = ends[[item.samples for item in ordered]]
        prompts = self._write_prompts(writer, ordered[len(decodes) :], len(decodes))
        inputs = upload.to(torch.empty(writer.num_values, dtype=torch.int32, device=self._device), writer.num_values)
        ids = token_ids.on(inputs)
        if decodes:
            ids[: len(decodes)] = self._resolve(ids[: len(decodes)], sources.on(inputs))
        step = CudaStep(
            self.cache,
            slots.on(inputs),
            tables.on(inputs).view(len(decodes), -1) if decodes else tables.on(inputs).view(0, 0),
            lens.on(inputs),
            tuple(prompt.on(inputs) for prompt in prompts),
            last.on(inputs).long(),
        )
        return self._forward(ids, positions.on(inputs), step)

    def _write_tables(self, writer: Writer, items: Items[ScheduledSequence]) -> Span:
        width = max((len(item.sequence.block_table) for item in items), default=0)
        tables = writer.take(len(items) * width)
        for row, item in zip(tables.array.reshape(len(items), width), items, strict=True):
            row[: len(item.sequence.block_table)] = item.sequence.block_table
        return tables

    def _write_prompts(self, writer: Writer, items: Items[ScheduledSequence], start: int) -> list["_PendingPrompts"]:
        """Bring neighbours in the batch that attend together into groups; `start`: of the first one."""
        groups: list[list[ScheduledSequence]] = []
        for item in items:
            if groups and _attend_together(groups[-1][-1], item):
                groups[-1].append(item)
            else:
                groups.append([item])
        written = []
        for group in groups:
            counts = np.array([item.num_tokens for item in group])
            ends = np.array([item.start for item in group]) + counts
            starts = writer.take(len(group) + 1)
            starts.array[0], starts.array[1:] = 0, np.cumsum(counts)
            context = None
            if group[0].start:
                lens, capacities = writer.take(len(group)), writer.take(len(group) + 1)
                lens.array[:] = ends
                width = max(len(item.sequence.block_table) for item in group) * self.cache.block_size
                capacities.array[:] = np.arange(len(group) + 1) * width
                context = lens, capacities, self._write_tables(writer, group)
            shape = start, int(counts.sum()), int(counts.max()), int(ends.max())
            sequences = tuple((item.start, item.num_tokens) for item in group)
            written.append(_PendingPrompts(*shape, sequences, starts, context))
            start += int(counts.sum())
        return written

    def _resolve(self, ids: Tensor, sources: Tensor) -> Tensor:
        """Put in the tokens that the step before drew."""
        return torch.where(sources >= 0, self._drawn[sources.clamp(min=0)].to(ids.dtype), ids)

    def _forward(self, ids: Tensor, positions: Tensor, step: CudaStep) -> Tensor:
        """Logits of the step's rows."""
        keep: Tensor | int = 0
        if step.rows is not None and not self._drops_rows:
            keep, step.rows = step.rows, None
        logits: Tensor = self._model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            paged_step=step,
        ).logits[0]
        return logits

    def _capture(self) -> None:
        """Record a graph for each size, the largest first, so that the others find its memory."""
        started = time.monotonic()
        longest = min(self._limits.max_num_batched_tokens, self._limits.max_model_len)
        lengths = [length for length in reversed(PROMPT_LENGTHS) if length <= longest]
        sizes = [*reversed(ladder(self._max_graph_batch))]
        total, pool = len(lengths) + len(sizes), None
        for number in range(total):
            if number < len(lengths):
                pool = self._capture_prompt(lengths[number], pool)
            else:
                pool = self._capture_decode(sizes[number - len(lengths)], pool)
            if number in (0, total - 1) or number % 8 == 7:
                logger.info("CUDA graphs: %d of %d, %.1f s", number + 1, total, time.monotonic() - started)

    @torch.inference_mode()
    def _capture_decode(self, size: int, pool: MemoryPool | None) -> MemoryPool:
        num_seqs = self._limits.max_num_seqs
        ids, sources, positions, slots, lens = self._decode_inputs[: 5 * num_seqs].view(5, num_seqs)[:, :size]
        tables = self._decode_inputs[5 * num_seqs :].view(num_seqs, self._max_blocks)[:size]

        def run() -> Tensor:
            step = CudaStep(self.cache, slots, tables, lens)
            logits = self._forward(self._resolve(ids, sources), positions, step)
            self._drawn[:size] = logits.argmax(dim=-1)
            return logits

        graph = torch.cuda.CUDAGraph()
        self._graphs[size] = DecodeGraph(size, graph, record(graph, run, pool))
        return graph.pool()

    @torch.inference_mode()
    def _capture_prompt(self, length: int, pool: MemoryPool | None) -> MemoryPool:
        recorded = self._prompt_graphs[length] = PromptGraph(length, self._device)
        ids, positions, slots = recorded.inputs[:-1].view(3, length)
        nothing = recorded.inputs[:0]

        # One for the run that warms up and for the recording: replays read what it holds.
        prompt = Prompts(0, length, length, length, recorded.starts, ((0, length),), is_recorded=True)
        recorded.holds = prompt

        def run() -> Tensor:
            last = recorded.inputs[-1:].long()
            step = CudaStep(self.cache, slots, nothing.view(0, 0), nothing, (prompt,), last)
            return self._forward(ids, positions, step)

        recorded.logits = record(recorded.graph, run, pool)
        return recorded.graph.pool()


def _attend_together(one: ScheduledSequence, other: ScheduledSequence) -> bool:
    """Whole prompts do, and chunks with context, but for long ones."""
    if one.start == 0 or other.start == 0:
        return one.start == other.start == 0
    return max(one.num_tokens, other.num_tokens) < LONG_CHUNK


@dataclass(frozen=True, slots=True)
class _PendingPrompts:
    """`Prompts` whose tensors are not uploaded yet."""

    start: int
    num_tokens: int
    max_queries: int
    max_keys: int
    sequences: tuple[tuple[int, int], ...]
    starts: Span
    context: tuple[Span, Span, Span] | None

    def on(self, inputs: Tensor) -> Prompts:
        shape = self.start, self.num_tokens, self.max_queries, self.max_keys
        if self.context is None:
            return Prompts(*shape, self.starts.on(inputs), self.sequences)
        lens, capacities, tables = (span.on(inputs) for span in self.context)
        on_gpu = lens, capacities, tables.view(len(self.sequences), -1)
        return Prompts(*shape, self.starts.on(inputs), self.sequences, *on_gpu)
