"""Runs a head that guesses for a model on a GPU, by graphs, and waits for it only when guesses are to be told.

There are graphs of two kinds, for a ladder of sizes each: those that compute the KV of known tokens, and those that
guess one more token of each sequence, by what the one before has left on the GPU. The likeliest tokens are chosen
within them, others between two.
"""

from bisect import bisect_left
from functools import partial

import torch
from torch import Tensor

from deployments.engine.attention.cuda import CudaStep, write
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.config import EngineLimits
from deployments.engine.execution.graphs import MAX_GRAPH_BATCH, MemoryPool, ladder, padded_batch, record
from deployments.engine.execution.heads import KnownTokens, NewestTokens
from deployments.engine.kv.cache import KVCache
from deployments.engine.model.eagle3 import Eagle3Head
from deployments.engine.sampling.guessing import GuessDraws
from deployments.engine.sampling.sampler import compile_draws
from deployments.engine.upload import Span, Upload, Writer, upload

# Known tokens of a step; between these they are padded to the next one, more are launched as a whole.
_KNOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class CudaHead:
    """See the module; a `HeadRunner`.

    Args:
        head: its layers those of a GPU.
        limits: of the engine.
        device: the GPU.
    """

    def __init__(self, head: Eagle3Head, limits: EngineLimits, device: torch.device) -> None:
        self._head, self._device = head, device
        self.cache = KVCache(head.kv_shape, limits.num_blocks, limits.block_size, device)
        self._holds = head.tabulate(limits.max_model_len)  # graphs read it, whatever becomes of the head's own
        self._max_seqs = min(limits.max_num_seqs, MAX_GRAPH_BATCH)
        self._sizes = _KNOWN[: bisect_left(_KNOWN, limits.max_num_batched_tokens) + 1]
        self._given = self._states(self._sizes[-1])
        self._known = self._numbers(4 * self._sizes[-1])
        # Two: tokens are laid out while the copy of those before may still be read.
        self._uploads, self._turn = [Upload(len(self._known)) for _ in range(2)], 0
        self._learning: dict[int, torch.cuda.CUDAGraph] = {}
        # Of guesses: what the next ones go on from, and what they read.
        self._latest = self._states(self._max_seqs)
        self._drawn = self._numbers(self._max_seqs, dtype=torch.int64)
        self._columns = self._numbers(3 * self._max_seqs)
        self._tables = self._numbers(self._max_seqs, -(-limits.max_model_len // limits.block_size))
        self._guessed = self._numbers(limits.max_drafts, self._max_seqs, dtype=torch.int64)
        num_values = self._tables.numel() + (4 * limits.max_drafts + 8) * self._max_seqs + 64
        self._upload, self._queue = Upload(num_values), self._numbers(num_values)
        self._guessing: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._capture()
        compile_draws(head.vocab_size, self._latest.dtype, device)

    @torch.inference_mode()
    def learn(self, states: Tensor, known: KnownTokens) -> None:
        count = len(known.places)
        if count > self._sizes[-1]:
            places, *others = (upload(values, self._device) for values in known)
            self._write(states.index_select(0, places), *others)
            return
        size = self._sizes[bisect_left(self._sizes, count)]
        self._turn ^= 1
        laid_out = self._uploads[self._turn]
        columns = laid_out.values[: 4 * size].reshape(4, size)
        for column, values, nothing in zip(columns, known, (0, 0, 0, -1), strict=True):
            column[:count], column[count:] = values, nothing
        inputs = laid_out.to(self._known, 4 * size)
        torch.index_select(states, 0, inputs[:size], out=self._given[:size])
        self._learning[size].replay()

    @torch.inference_mode()
    def guess(self, states: Tensor, newest: NewestTokens, draws: GuessDraws) -> list[list[int]]:
        newest = newest.first(self._max_seqs)
        num_seqs, num_guesses = len(newest.lengths), int(newest.lengths[0])
        for place, (count, columns) in enumerate(self._begin(states, newest)):
            self._columns[: len(columns)].copy_(columns)
            graph, logits = self._guessing[len(columns) // 3]
            graph.replay()
            if not draws.draws_likeliest(place):
                self._drawn[:count] = draws.draw(place, self._head.spread(logits[:count]))
            self._guessed[place, :count] = self._drawn[:count]
        return newest.lists(self._guessed[:num_guesses, :num_seqs].tolist())

    def _begin(self, states: Tensor, newest: NewestTokens) -> list[tuple[int, Tensor]]:
        """Put in place what the first guesses go on from; of each place how many there are, and what its graph reads.

        All that the host knows of all guesses is uploaded at once: the last ones were told, so nobody reads it.
        """
        writer, num_seqs, width = Writer(self._upload.values), *newest.tables.shape
        spans = [writer.write(v) for v in (newest.places, newest.token_ids, newest.tables.reshape(-1))]
        steps = [newest.step(place, self.cache.block_size) for place in range(int(newest.lengths[0]))]
        columns = [self._fill(writer, arrays) for arrays in steps]
        inputs = self._upload.to(self._queue, writer.num_values)
        places, token_ids, tables = (span.on(inputs) for span in spans)
        torch.index_select(states, 0, places, out=self._latest[:num_seqs])
        self._drawn[:num_seqs].copy_(token_ids)
        self._tables[:num_seqs, :width].copy_(tables.view(num_seqs, width))
        return [(arrays.num_tokens, span.on(inputs)) for arrays, span in zip(steps, columns, strict=True)]

    def _fill(self, writer: Writer, arrays: StepArrays) -> Span:
        """What a graph reads of the guesses of one place: positions, slots and lengths."""
        count, size = arrays.num_tokens, padded_batch(arrays.num_tokens, self._max_seqs)
        span = writer.take(3 * size)
        given = arrays.positions, arrays.slots[0], arrays.single_lens
        for column, values, nothing in zip(span.array.reshape(3, size), given, (0, -1, 0), strict=True):
            column[:count], column[count:] = values, nothing
        return span

    def _write(self, states: Tensor, token_ids: Tensor, positions: Tensor, slot_mapping: Tensor) -> None:
        asked = self._head.ask(states, token_ids, positions)
        write(asked, self.cache.paged(0), slot_mapping, keeps=False)

    def _guess(self, size: int) -> Tensor:
        """One more token of each sequence: logits of those that the head knows."""
        positions, slot_mapping, lens = self._columns[: 3 * size].view(3, size)
        step = CudaStep(self.cache, slot_mapping.unsqueeze(0), (self._tables[:size],), lens)
        states = self._head(self._latest[:size], self._drawn[:size], positions, step)
        self._latest[:size] = states
        known = self._head.known_logits(states)
        self._drawn[:size] = self._head.target_ids.index_select(0, known.argmax(dim=-1))
        return known

    @torch.inference_mode()
    def _capture(self) -> None:
        """Record a graph for each size, the largest first, so that the others find its memory.

        What they read is zero: they write to the first block, which is nobody's yet.
        """
        pool: MemoryPool | None = None
        for size in reversed(self._sizes):
            _, *known = self._known[: 4 * size].view(4, size)
            graph = self._learning[size] = torch.cuda.CUDAGraph()
            record(graph, partial(self._write, self._given[:size], *known), pool)
            pool = graph.pool()
        for size in reversed(ladder(self._max_seqs)):
            graph = torch.cuda.CUDAGraph()
            self._guessing[size] = graph, record(graph, partial(self._guess, size), pool)
            pool = graph.pool()

    def _states(self, count: int) -> Tensor:
        weight = self._head.norm.weight
        return weight.new_zeros(count, self._head.hidden_size)

    def _numbers(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._device)
