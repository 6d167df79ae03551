"""From scheduled sequences to the plain arrays of one step."""

from collections.abc import Mapping
from itertools import accumulate
from operator import attrgetter

import numpy as np

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kv.slots import slots
from deployments.engine.scheduling.ids import block_array, token_array
from deployments.engine.scheduling.run import ScheduledSequence

_PENDING = -1  # a step in flight draws it
_start = attrgetter("start")


def order_for_batch(scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Single tokens first, then decodes with drafts, each the longest sequence's in front, then prompts.

    Single is a shape: one token, and it draws. Most are decodes without drafts; the last token of a prompt is one too.
    They are attended together, whatever their sequences' lengths. Their attention begins in this order, and ends early
    where the short ones are left to the end.
    """
    singles: list[ScheduledSequence] = []
    others: list[ScheduledSequence] = []
    for item in scheduled:
        (singles if item.num_tokens == item.num_draws == 1 else others).append(item)
    singles.sort(key=_start, reverse=True)
    return singles + sorted(others, key=_rank) if others else singles


def _rank(item: ScheduledSequence) -> tuple[bool, int]:
    """Of those that are no single tokens."""
    return not item.is_decode, -item.start if item.is_decode else 0


def build_arrays(
    items: list[ScheduledSequence], block_size: int, row_of: Mapping[str, int], num_groups: int = 1
) -> StepArrays:
    """Lay out one step.

    Args:
        items: as `order_for_batch` leaves them.
        block_size: tokens per block.
        row_of: where the step before draws for a request, among its draws.
        num_groups: of layers, the first of those for which sequences have tables.
    """
    num_runs = len(items)
    starts = _column([item.start for item in items])
    counts = _column([item.num_tokens for item in items])
    draws = _column([item.num_draws for item in items])
    offsets = _column([item.sequence.position_offset for item in items])
    num_singles = int(((counts == 1) & (draws == 1)).sum())
    token_ids, sources = _tokens(items, num_singles, row_of)
    tables = _tables(items, -(-(starts + counts) // block_size), num_groups)
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
        num_singles=num_singles,
        draw_rows=draw_rows,
        draw_positions=positions[draw_rows] + 1,
    )


def rows_of(items: list[ScheduledSequence]) -> dict[str, int]:
    """Where a step with these items draws for each request: its first row among the draws."""
    firsts = accumulate([item.num_draws for item in items], initial=0)
    return {item.sequence.request_id: row for item, row in zip(items, firsts, strict=False) if item.num_draws}


def _column(values: list[int]) -> np.ndarray:
    return np.fromiter(values, np.int64, len(values))


def _tokens(
    items: list[ScheduledSequence], num_singles: int, row_of: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and sources of the single ones; no others can be pending."""
    singles = [(item.sequence.token_ids, item.start) for item in items[:num_singles]]
    newest = _column([known[start] if start < len(known) else _PENDING for known, start in singles])
    sources = np.full(num_singles, -1)
    pending = np.flatnonzero(newest == _PENDING)
    sources[pending] = [row_of[items[row].sequence.request_id] for row in pending.tolist()]
    newest[pending] = 0
    if num_singles == len(items):
        return newest, sources
    others = token_array()
    for item in items[num_singles:]:
        others += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        others.extend(item.drafts)
    return np.concatenate((newest, np.frombuffer(others, np.uint32))), sources


def _tables(items: list[ScheduledSequence], num_blocks: np.ndarray, num_groups: int) -> np.ndarray:
    """(G, R, B), of each run so many blocks."""
    width, flat, sizes = int(num_blocks.max()), block_array(), num_blocks.tolist()
    for item, size in zip(items, sizes, strict=True):
        flat += item.sequence.block_table[:size]
    for group in range(1, num_groups):
        for item, size in zip(items, sizes, strict=True):
            flat += item.sequence.tables.each[group][:size]
    padded, is_held = np.zeros((num_groups, len(items), width), np.int64), np.arange(width) < num_blocks[:, None]
    for table, held in zip(padded, np.frombuffer(flat, np.int32).reshape(num_groups, -1), strict=True):
        table[is_held] = held
    return padded


def _last(ends: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The last tokens of each run, as many as it draws; `ends`: of the runs in the batch."""
    stops = np.cumsum(draws)
    rows: np.ndarray = np.arange(int(stops[-1])) + np.repeat(ends - stops, draws)
    return rows
