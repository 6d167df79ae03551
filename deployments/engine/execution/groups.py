"""Which longer runs of a step that is launched as a whole attend together, and how they go up. Knows no model."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from deployments.engine.attention.cuda import LONG_CHUNK, Prompts
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.upload import Span, Writer


def groups(arrays: StepArrays) -> list[tuple[int, int]]:
    """First and end of the longer runs that attend together: whole prompts, and chunks with context."""
    found: list[tuple[int, int]] = []
    for run in range(arrays.num_singles, arrays.num_runs):
        if found and _attend_together(arrays, run - 1, run):
            found[-1] = found[-1][0], run + 1
        else:
            found.append((run, run + 1))
    return found


def _attend_together(arrays: StepArrays, one: int, other: int) -> bool:
    """Whole prompts do, and chunks with context, but for long ones."""
    if arrays.starts[one] == 0 or arrays.starts[other] == 0:
        return bool(arrays.starts[one] == arrays.starts[other] == 0)
    return bool(max(arrays.counts[one], arrays.counts[other]) < LONG_CHUNK)


@dataclass(frozen=True, slots=True)
class PendingPrompts:
    """`Prompts` whose tensors are not uploaded yet."""

    start: int
    num_tokens: int
    max_queries: int
    max_keys: int
    sequences: tuple[tuple[int, int], ...]
    starts: Span
    context: tuple[Span, Span, tuple[Span, ...]] | None

    def on(self, inputs: Tensor) -> Prompts:
        shape = self.start, self.num_tokens, self.max_queries, self.max_keys
        if self.context is None:
            return Prompts(*shape, self.starts.on(inputs), self.sequences)
        lens, capacities, tables = self.context
        by_group = tuple(table.on(inputs).view(len(self.sequences), -1) for table in tables)
        on_gpu = lens.on(inputs), capacities.on(inputs), by_group
        return Prompts(*shape, self.starts.on(inputs), self.sequences, *on_gpu)


def write_tables(writer: Writer, arrays: StepArrays, runs: range, block_size: int) -> tuple[Span, ...]:
    """The blocks of some runs, by the group of layers; as wide as the longest of them needs."""
    lens = (arrays.starts + arrays.counts)[runs.start : runs.stop]
    width = -(-int(lens.max(initial=0)) // block_size)
    return tuple(writer.write(table[runs.start : runs.stop, :width].reshape(-1)) for table in arrays.tables)


def write_prompts(writer: Writer, arrays: StepArrays, block_size: int) -> list[PendingPrompts]:
    """Bring neighbours in the batch that attend together into groups."""
    written, row = [], arrays.num_singles
    for first, end in groups(arrays):
        starts, counts = arrays.starts[first:end], arrays.counts[first:end]
        lens = starts + counts
        edges = writer.write(np.concatenate(([0], np.cumsum(counts))))
        context = None
        if starts[0]:
            tables = write_tables(writer, arrays, range(first, end), block_size)
            width = len(tables[0].array) // len(counts) * block_size
            context = writer.write(lens), writer.write(np.arange(len(counts) + 1) * width), tables
        sequences = tuple(zip(starts.tolist(), counts.tolist(), strict=True))
        shape = row, int(counts.sum()), int(counts.max()), int(lens.max())
        written.append(PendingPrompts(*shape, sequences, edges, context))
        row += int(counts.sum())
    return written
