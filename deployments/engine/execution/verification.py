"""Steps that verify drafts as CUDA graphs: decodes alone, of one token or several each, for a ladder of sizes.

A graph has room for so many sequences and so many tokens, whoever's they are: a sequence with few drafts takes no room
of others, and products, which cost the most, are of the tokens that there are, padded to the next size.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from deployments.engine.attention.cuda_verification import VerificationStep
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.config import EngineLimits
from deployments.engine.execution.graphs import MemoryPool, SinglesGraph, record
from deployments.engine.execution.parts import fill_runs, fill_tokens, two_tokens
from deployments.engine.kernels.cuda_verification import Runs
from deployments.engine.kv.cache import KVCache
from deployments.engine.scheduling.scheduler import MAX_VERIFIED_TOKENS
from deployments.engine.upload import Upload

# Tokens of a step; between these it is padded to the next one.
_TOKENS = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, MAX_VERIFIED_TOKENS)

Array = TypeVar("Array", np.ndarray, Tensor)
# Logits of token ids, their sources among the draws of the step before, and positions; draws the likeliest tokens.
RunTokens = Callable[[Tensor, Tensor, Tensor, VerificationStep], Tensor]


def verification_sizes(limits: EngineLimits) -> list[tuple[int, int]]:
    """(sequences, tokens) that are recorded, the smallest first; none without drafts."""
    if not limits.max_drafts:
        return []
    max_tokens = min(MAX_VERIFIED_TOKENS, limits.max_num_batched_tokens)
    max_seqs = min(limits.max_num_seqs, max_tokens - 1)
    sizes: list[tuple[int, int]] = []
    smaller = 0
    while smaller < max_seqs:
        num_seqs = min(max(1, 2 * smaller), max_seqs)
        most = min(max_tokens, num_seqs * (1 + limits.max_drafts))
        # One draft at least, and one sequence more than the size before holds.
        tokens = [count for count in _TOKENS if smaller + 1 < count < most]
        sizes += [(num_seqs, count) for count in (*tokens, most)]
        smaller = num_seqs
    return sizes


class Verification:
    """Records the graphs, lays out what they read, and replays them.

    Args:
        cache: the pool.
        limits: of the engine; with drafts.
        run: the model.
        device: the GPU.
    """

    def __init__(self, cache: KVCache, limits: EngineLimits, run: RunTokens, device: torch.device) -> None:
        self._cache, self._run = cache, run
        self._num_groups, self._num_columns = cache.num_groups, 4 + cache.num_groups
        self.sizes = verification_sizes(limits)
        self._max_queries = 1 + limits.max_drafts
        self._max_blocks = -(-limits.max_model_len // cache.block_size)
        self._max_seqs = max(num_seqs for num_seqs, _ in self.sizes)
        self._max_tokens = max(num_tokens for _, num_tokens in self.sizes)
        # Two: one step is prepared while the copy of the one before may still be read.
        self._uploads = [Upload(self._num_values(self._max_seqs)) for _ in range(2)]
        self._inputs = torch.zeros(self._num_values(self._max_seqs), dtype=torch.int32, device=device)
        first_slot, num_slots = 3 * self._max_tokens, cache.num_groups * self._max_tokens
        self._inputs[first_slot : first_slot + num_slots] = -1  # nothing is written yet
        self._graphs: dict[tuple[int, int], SinglesGraph] = {}
        self._fill(self._uploads[0].values, two_tokens(self._num_groups), self.sizes[0])  # compiled before it is needed

    def find(self, arrays: StepArrays) -> tuple[int, int] | None:
        """The smallest graph that holds a step; None: it is too large, or not of tokens alone that all draw."""
        if len(arrays.draw_rows) != arrays.num_tokens or arrays.counts.max() > self._max_queries:
            return None
        given = arrays.num_runs, arrays.num_tokens
        return next((size for size in self.sizes if size[0] >= given[0] and size[1] >= given[1]), None)

    def replay(self, arrays: StepArrays, size: tuple[int, int], turn: int) -> Tensor:
        """Run a step as the graph that `find` has found: (at least T, vocab_size) logits, in the order of the batch."""
        upload = self._uploads[turn]
        self._fill(upload.values, arrays, size)
        upload.to(self._inputs, self._num_values(size[0]))
        graph = self._graphs[size]
        graph.graph.replay()
        return graph.logits

    @torch.inference_mode()
    def capture(self, size: tuple[int, int], pool: MemoryPool | None) -> MemoryPool:
        """Record the graph of a size."""
        num_seqs, num_tokens = size
        columns, lens, starts, tables = self._parts(self._inputs)
        columns = columns[:, :num_tokens]
        (ids, sources, positions), slots, owners = columns[:3], columns[3:-1], columns[-1]
        runs = Runs(lens[:num_seqs], starts[: num_seqs + 1], owners, self._max_queries)

        def run() -> Tensor:
            step = VerificationStep(self._cache, slots, tables[:num_seqs].unbind(1), runs)
            return self._run(ids, sources, positions, step)

        graph = torch.cuda.CUDAGraph()
        self._graphs[size] = SinglesGraph(num_tokens, graph, record(graph, run, pool))
        return graph.pool()

    def _fill(self, values: np.ndarray, arrays: StepArrays, size: tuple[int, int]) -> None:
        """Write what a graph reads."""
        columns, lens, starts, tables = self._parts(values)
        fill_tokens(columns, arrays, size[1])
        fill_runs(lens, starts, tables, arrays, size[0])

    def _num_values(self, num_seqs: int) -> int:
        """That are read for so many sequences; those of tables come last."""
        of_tokens, of_tables = self._num_columns * self._max_tokens, num_seqs * self._num_groups * self._max_blocks
        return of_tokens + 2 * self._max_seqs + 1 + of_tables

    def _parts(self, values: Array) -> tuple[Array, Array, Array, Array]:
        """Columns of the tokens, lengths, starts, and tables."""
        first, num_seqs = self._num_columns * self._max_tokens, self._max_seqs
        lens, starts = values[first : first + num_seqs], values[first + num_seqs : first + 2 * num_seqs + 1]
        tables = values[first + 2 * num_seqs + 1 :].reshape(num_seqs, self._num_groups, self._max_blocks)
        return values[:first].reshape(self._num_columns, self._max_tokens), lens, starts, tables
