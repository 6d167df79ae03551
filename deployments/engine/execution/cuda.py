"""Runs scheduled steps on a GPU without ever waiting for it: as CUDA graphs, or launched as a whole.

Single tokens, mostly decodes, are recorded, and so are decodes with drafts (`verification.py`), a whole prompt, and a
short chunk of one, each by itself. Where there is little to compute, single tokens and prompts are replayed one after
the other for one step (`parts.py`).

The host prepares a step in pinned memory while the GPU runs the one before. Drawn tokens stay on the GPU, where the
next step finds them; their copies for the host arrive by themselves and are waited for one step later.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.attention.cuda import CudaStep, Prompts
from deployments.engine.attention.cuda_verification import VerificationStep
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.config import EngineLimits
from deployments.engine.execution.base import LaunchedStep, Preparation, PreparedStep
from deployments.engine.execution.costs import StepCosts, bytes_per_ms
from deployments.engine.execution.graphs import (
    MAX_GRAPH_BATCH,
    GraphMarks,
    MemoryPool,
    PromptGraph,
    SinglesGraph,
    ladder,
    padded_batch,
    prompt_lengths,
    record,
)
from deployments.engine.execution.groups import write_prompts, write_tables
from deployments.engine.execution.looking import Sight
from deployments.engine.execution.parts import (
    MAX_CHUNK,
    chunk_values,
    fill_chunk,
    fill_prompt,
    fill_singles,
    prompt_values,
    recorded_prompts,
)
from deployments.engine.execution.verification import Verification
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.layers.base import weights_of
from deployments.engine.layers.cuda import can_drop_rows
from deployments.engine.model.load import LoadedModel
from deployments.engine.sampling.sampler import compile_draws, sample
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.upload import Upload, Writer

logger = logging.getLogger(__name__)


class CudaRunner:
    """Executes steps of a model whose attention `CudaStep` serves; see `Runner`.

    Args:
        loaded: the model, its layers optimized for a GPU.
        cache: the pool.
        limits: of the engine.
    """

    def __init__(self, loaded: LoadedModel, cache: KVCache, limits: EngineLimits) -> None:
        self._model: PreTrainedModel = loaded.model
        self._device = loaded.device
        self._drops_rows = can_drop_rows(loaded.model)
        config = loaded.model.config
        weights = weights_of(loaded.model, getattr(config, "num_experts_per_tok", None))
        gpu = torch.cuda.get_device_properties(loaded.device)
        rate = bytes_per_ms(gpu.memory_clock_rate, gpu.memory_bus_width)
        self._costs = StepCosts(config.num_hidden_layers, weights, loaded.kv_shape.bytes_per_token, rate)
        self.cache = cache
        self._limits = limits
        self._max_blocks = -(-limits.max_model_len // cache.block_size)
        self._preparation = Preparation(cache)
        self._num_groups = num_groups = cache.num_groups
        num_seqs, max_draws = limits.max_num_seqs, limits.max_num_batched_tokens
        self._max_graph_batch = min(num_seqs, MAX_GRAPH_BATCH)
        # Two of each: one step is prepared while the copy of the one before may still be read.
        flat = num_seqs * (4 + num_groups + num_groups * self._max_blocks)
        self._singles_uploads = [Upload(flat) for _ in range(2)]
        self._singles_inputs = torch.zeros(flat, dtype=torch.int32, device=self._device)
        self._singles_inputs[3 * num_seqs : (3 + num_groups) * num_seqs] = -1
        flat = 3 * (1 + num_groups) * limits.max_num_batched_tokens
        flat += num_seqs * num_groups * (2 * self._max_blocks + 64) + 64
        self._prompt_uploads = [Upload(flat) for _ in range(2)]
        self._results = [torch.empty(max_draws, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._drawn = torch.zeros(max_draws, dtype=torch.int64, device=self._device)
        self._turn = 0
        self._graphs: dict[int, SinglesGraph] = {}
        self._prompt_graphs: dict[int, PromptGraph] = {}
        self._chunk_graphs: dict[int, PromptGraph] = {}
        self._verification = Verification(cache, limits, self._draw, self._device) if limits.max_drafts else None
        self._lengths = prompt_lengths(min(limits.max_num_batched_tokens, limits.max_model_len))
        most = max(limits.max_num_batched_tokens, self._lengths[-1])
        self._sight = None if loaded.head is None else Sight(loaded.model, loaded.head, most)
        self._capture()
        compile_draws(loaded.vocab_size, loaded.model.dtype, loaded.device)

    @torch.inference_mode()
    def launch(self, scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        self._turn ^= 1
        step = self._preparation.prepare(scheduled)
        arrays, sampling = step.arrays, step.sampling
        # Before the step: a graph puts its own draws where those of the step before are.
        adjusting = None if step.adjusting is None else step.adjusting.on(self._drawn)
        is_drawn, states = True, None if self._sight is None else self._sight.begin(arrays.num_tokens)
        if arrays.num_singles == arrays.num_runs <= self._max_graph_batch:
            logits = self._replay_singles(arrays).logits
        elif self._verification is not None and (size := self._verification.find(arrays)) is not None:
            logits = self._verification.replay(arrays, size, self._turn)
            self._take_states(arrays.num_tokens)
        elif (graphs := self._recorded_parts(step)) is not None:
            is_drawn, logits = False, self._replay_parts(step, graphs, watch)
        else:
            is_drawn, logits = False, self._run_eagerly(arrays, step.logit_rows, watch)
        num_draws = len(arrays.draw_rows)
        result = self._results[self._turn][:num_draws]
        if sampling is not None:
            to_draw = logits[:num_draws] if adjusting is None else adjusting.apply(logits[:num_draws])
            if step.masking is not None:
                to_draw = step.masking.apply(to_draw)
            if not (is_drawn and sampling.is_greedy) or adjusting is not None or step.masking is not None:
                self._drawn[:num_draws] = sample(to_draw, sampling)
            result.copy_(self._drawn[:num_draws], non_blocking=True)
        scores = None if step.scoring is None else step.scoring.score(logits, self._drawn[:num_draws])
        done = torch.cuda.Event()
        done.record()
        return LaunchedStep(step.items, result, done, scores, states)

    def _replay_singles(self, arrays: StepArrays) -> SinglesGraph:
        graph = self._graphs[padded_batch(arrays.num_singles, self._max_graph_batch)]
        upload, num_groups = self._singles_uploads[self._turn], self._num_groups
        of_columns = (4 + num_groups) * self._limits.max_num_seqs
        columns = upload.values[:of_columns].reshape(4 + num_groups, -1)
        tables = upload.values[of_columns:].reshape(-1, num_groups, self._max_blocks)
        fill_singles(columns, tables, arrays, graph.batch_size)
        upload.to(self._singles_inputs, of_columns + graph.batch_size * num_groups * self._max_blocks)
        graph.graph.replay()
        self._take_states(arrays.num_singles)
        return graph

    def _take_states(self, num_tokens: int) -> None:
        """Those that a head guesses by, of the tokens that were computed last; the next replay writes over them."""
        if self._sight is not None:
            self._sight.take(num_tokens)

    def _recorded_parts(self, step: PreparedStep) -> list[PromptGraph] | None:
        """The graphs that a step's prompts and chunks take; None: it is launched as a whole."""
        if step.scoring is not None and len(step.scoring.rows):
            return None  # more logits of a prompt are wanted than a graph gives
        arrays = step.arrays
        counts = recorded_prompts(arrays, self._costs)
        if not counts or arrays.num_singles > self._max_graph_batch:
            return None
        found = []
        for count, context in zip(counts, arrays.starts[arrays.num_singles :].tolist(), strict=True):
            graphs = self._chunk_graphs if context else self._prompt_graphs
            if count > max(graphs, default=0):
                return None
            found.append(graphs[min(length for length in graphs if length >= count)])
        return found

    def _replay_parts(self, step: PreparedStep, graphs: list[PromptGraph], watch: LayerWatch | None) -> Tensor:
        """Single tokens, then each prompt or chunk, each as the graph of its size; logits of all that draw."""
        arrays = step.arrays
        first, upload = arrays.num_singles, self._prompt_uploads[self._turn]
        writer = Writer(upload.values)
        spans = [writer.take(len(graph.inputs)) for graph in graphs]
        for run, (graph, span) in enumerate(zip(graphs, spans, strict=True), first):
            if arrays.starts[run]:
                fill_chunk(span.array, arrays, run, graph.length)
            else:
                fill_prompt(span.array, arrays, run)
        inputs = upload.to(torch.empty(writer.num_values, dtype=torch.int32, device=self._device), writer.num_values)
        # Copied at once: graphs share their memory, so the next one may write over what the last one gave.
        recorded = self._graphs[self._max_graph_batch].logits
        logits = recorded.new_empty((len(arrays.draw_rows), recorded.shape[1]))
        if first:
            logits[:first] = self._replay_singles(arrays).logits[:first]
        drawing = np.isin(np.cumsum(arrays.counts) - 1, arrays.draw_rows)
        row = first
        for graph, span, draws, item in zip(graphs, spans, drawing[first:].tolist(), step.items[first:], strict=True):
            graph.inputs.copy_(span.on(inputs))
            graph.graph.replay()
            self._take_states(item.num_tokens)
            if watch is not None and graph.marks is not None:
                graph.marks.tell(watch, item.sequence.request_id)
            if draws:
                assert graph.logits is not None
                logits[row] = graph.logits[0]
                row += 1
        return logits

    def _run_eagerly(self, arrays: StepArrays, logit_rows: np.ndarray, watch: LayerWatch | None) -> Tensor:
        upload, num_singles = self._prompt_uploads[self._turn], arrays.num_singles
        writer = Writer(upload.values)
        flat = (
            arrays.token_ids,
            arrays.positions,
            arrays.slots.ravel(),
            arrays.sources,
            arrays.single_lens,
            logit_rows,
        )
        token_ids, positions, slots, sources, lens, last = (writer.write(values) for values in flat)
        tables = write_tables(writer, arrays, range(num_singles), self.cache.block_size)
        prompts = write_prompts(writer, arrays, self.cache.block_size)
        inputs = upload.to(torch.empty(writer.num_values, dtype=torch.int32, device=self._device), writer.num_values)
        ids = token_ids.on(inputs)
        if num_singles:
            ids[:num_singles] = self._resolve(ids[:num_singles], sources.on(inputs))
        step = CudaStep(
            self.cache,
            slots.on(inputs).view(self._num_groups, -1),
            tuple(table.on(inputs).view(num_singles, -1 if num_singles else 0) for table in tables),
            lens.on(inputs),
            tuple(prompt.on(inputs) for prompt in prompts),
            last.on(inputs).long(),
            watch,
        )
        logits = self._forward(ids, positions.on(inputs), step)
        self._take_states(arrays.num_tokens)
        return logits

    def _resolve(self, ids: Tensor, sources: Tensor) -> Tensor:
        """Put in the tokens that the step before drew."""
        return torch.where(sources >= 0, self._drawn[sources.clamp(min=0)].to(ids.dtype), ids)

    def _draw(self, ids: Tensor, sources: Tensor, positions: Tensor, step: CudaStep | VerificationStep) -> Tensor:
        """Logits of tokens that all draw; the likeliest tokens are drawn."""
        logits = self._forward(self._resolve(ids, sources), positions, step)
        self._drawn[: len(ids)] = logits.argmax(dim=-1)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, step: CudaStep | VerificationStep) -> Tensor:
        """Logits of the step's rows."""
        keep: Tensor | int = 0
        if step.rows is not None and not self._drops_rows:
            keep, step.rows = step.rows, None

        def compute() -> Tensor:
            logits: Tensor = self._model(
                input_ids=ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=keep,
                paged_step=step,
            ).logits[0]
            return logits

        return compute() if self._sight is None else self._sight.look(compute)

    def _capture(self) -> None:
        """Record a graph for each size, the largest first, so that the others find its memory."""
        started = time.monotonic()
        lengths = self._lengths[::-1]
        chunks = [length for length in lengths if length <= MAX_CHUNK]
        parts: list[Callable[[MemoryPool | None], MemoryPool]] = [
            *(partial(self._capture_prompt, length) for length in lengths),
            *(partial(self._capture_chunk, length) for length in chunks),
            *(partial(self._capture_singles, size) for size in reversed(ladder(self._max_graph_batch))),
        ]
        if self._verification is not None:
            parts += [partial(self._verification.capture, size) for size in reversed(self._verification.sizes)]
        pool: MemoryPool | None = None
        for number, capture in enumerate(parts, 1):
            pool = capture(pool)
            if number in (1, len(parts)) or number % 8 == 0:
                logger.info("CUDA graphs: %d of %d, %.1f s", number, len(parts), time.monotonic() - started)

    @torch.inference_mode()
    def _capture_singles(self, size: int, pool: MemoryPool | None) -> MemoryPool:
        num_seqs, num_columns = self._limits.max_num_seqs, 4 + self._num_groups
        columns = self._singles_inputs[: num_columns * num_seqs].view(num_columns, num_seqs)[:, :size]
        (ids, sources, positions), slots, lens = columns[:3], columns[3:-1], columns[-1]
        tables = self._singles_inputs[num_columns * num_seqs :].view(num_seqs, self._num_groups, self._max_blocks)

        def run() -> Tensor:
            return self._draw(ids, sources, positions, CudaStep(self.cache, slots, tables[:size].unbind(1), lens))

        graph = torch.cuda.CUDAGraph()
        self._graphs[size] = SinglesGraph(size, graph, record(graph, run, pool))
        return graph.pool()

    @torch.inference_mode()
    def _capture_prompt(self, length: int, pool: MemoryPool | None) -> MemoryPool:
        inputs = self._inputs(prompt_values(length, self._num_groups))
        recorded = self._prompt_graphs[length] = PromptGraph(length, inputs, self._num_groups, self._marks())
        starts = torch.tensor([0, length], dtype=torch.int32, device=self._device)
        prompt = Prompts(0, length, length, length, starts, ((0, length),), is_recorded=True)
        return self._capture_prompts(recorded, prompt, pool)

    @torch.inference_mode()
    def _capture_chunk(self, length: int, pool: MemoryPool | None) -> MemoryPool:
        of_prompt, num_groups = prompt_values(length, self._num_groups), self._num_groups
        inputs = self._inputs(chunk_values(length, self._max_blocks, num_groups))
        recorded = self._chunk_graphs[length] = PromptGraph(length, inputs, num_groups, self._marks())
        starts, lens, tables = inputs[of_prompt:].split((2, 1, num_groups * self._max_blocks))
        longest = self._max_blocks * self.cache.block_size
        by_group, sequences = tables.view(num_groups, 1, -1).unbind(), ((longest - length, length),)
        shape = 0, length, length, longest
        prompt = Prompts(*shape, starts, sequences, lens=lens, tables=by_group, is_recorded=True)
        return self._capture_prompts(recorded, prompt, pool)

    def _marks(self) -> GraphMarks | None:
        _, ends = self.cache.part_ends(self._limits.handoff_layer_parts)
        return GraphMarks(ends) if len(ends) > 1 else None

    def _inputs(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)

    def _capture_prompts(self, recorded: PromptGraph, prompts: Prompts, pool: MemoryPool | None) -> MemoryPool:
        of_prompt, num_groups = prompt_values(recorded.length, self._num_groups), self._num_groups
        columns, nothing = recorded.inputs[: of_prompt - 1].view(2 + num_groups, -1), recorded.inputs[:0]
        ids, positions, slots, last = columns[0], columns[1], columns[2:], recorded.inputs[of_prompt - 1 : of_prompt]
        # One for the run that warms up and for the recording: replays read what it holds.
        recorded.holds = prompts

        def run() -> Tensor:
            single = (nothing.view(0, 0),) * num_groups, nothing
            step = CudaStep(self.cache, slots, *single, (prompts,), last.long(), recorded.marks)
            return self._forward(ids, positions, step)

        recorded.logits = record(recorded.graph, run, pool)
        return recorded.graph.pool()
