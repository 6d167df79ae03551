"""From scheduled sequences to the plain arrays of one step."""

from collections.abc import Mapping
from itertools import chain

import numpy as np

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kv.slots import slots
from deployments.engine.scheduling.run import ScheduledSequence


def order_for_batch(scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Decodes first: those of one token are attended together, whatever their lengths; then those with drafts."""
    return sorted(scheduled, key=_rank)


def _rank(item: ScheduledSequence) -> int:
    if not item.is_decode:
        return 2
    return 0 if item.num_tokens == 1 else 1


def build_arrays(items: list[ScheduledSequence], block_size: int, row_of: Mapping[str, int]) -> StepArrays:
    """Lay out one step.

    Args:
        items: as `order_for_batch` leaves them.
        block_size: tokens per block.
        row_of: where the step before draws for a request, among its draws.
    """
    num_runs = len(items)
    starts = np.fromiter((item.start for item in items), np.int64, num_runs)
    counts = np.fromiter((item.num_tokens for item in items), np.int64, num_runs)
    draws = np.fromiter((item.num_draws for item in items), np.int64, num_runs)
    offsets = np.fromiter((item.sequence.position_offset for item in items), np.int64, num_runs)
    num_decodes = int(((counts == 1) & (draws == 1)).sum())
    token_ids, sources = _tokens(items, num_decodes, row_of)
    tables = _tables(items, -(-(starts + counts) // block_size))
    ends = np.cumsum(counts)
    rows = np.repeat(np.arange(num_runs), counts)
    positions = np.arange(len(rows)) + (starts - ends + counts)[rows]
    draw_rows = _last(ends, draws)
    return StepArrays(
        token_ids=token_ids,
        sources=sources,
        positions=positions + offsets[rows],
        slots=slots(tables, rows, positions, block_size),
        starts=starts,
        counts=counts,
        tables=tables,
        num_decodes=num_decodes,
        draw_rows=draw_rows,
        draw_positions=positions[draw_rows] + 1,
    )


def rows_of(items: list[ScheduledSequence]) -> dict[str, int]:
    """Where a step with these items draws for each request: its first row among the draws."""
    found, row = {}, 0
    for item in items:
        if item.num_draws:
            found[item.sequence.request_id] = row
            row += item.num_draws
    return found


def _tokens(
    items: list[ScheduledSequence], num_decodes: int, row_of: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and sources of those of the decodes; no others can be pending."""
    token_ids: list[int] = []
    sources = np.full(num_decodes, -1, np.int64)
    for row, item in enumerate(items[:num_decodes]):
        known, start = item.sequence.token_ids, item.start
        if start < len(known):
            token_ids.append(known[start])
        else:
            token_ids.append(0)
            sources[row] = row_of[item.sequence.request_id]
    for item in items[num_decodes:]:
        token_ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        token_ids += item.drafts
    return np.fromiter(token_ids, np.int64, len(token_ids)), sources


def _tables(items: list[ScheduledSequence], num_blocks: np.ndarray) -> np.ndarray:
    """(R, B), of each run so many blocks."""
    width, sizes = int(num_blocks.max()), num_blocks.tolist()
    tables = (item.sequence.block_table for item in items)
    flat = chain.from_iterable(table[:size] for table, size in zip(tables, sizes, strict=True))
    padded = np.zeros((len(items), width), np.int64)
    padded[np.arange(width) < num_blocks[:, None]] = np.fromiter(flat, np.int64, sum(sizes))
    return padded


def _last(ends: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The last tokens of each run, as many as it draws; `ends`: of the runs in the batch."""
    stops = np.cumsum(draws)
    rows: np.ndarray = np.arange(int(stops[-1])) + np.repeat(ends - stops, draws)
    return rows
