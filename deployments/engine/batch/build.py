"""From scheduled sequences to the plain arrays of one step."""
# mypy: disable-error-code="untyped-decorator"

from array import array
from itertools import accumulate
from operator import attrgetter

import numpy as np

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.compiled import njit
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
    items: list[ScheduledSequence], block_size: int, before: list[ScheduledSequence], num_groups: int = 1
) -> StepArrays:
    """Lay out one step.

    Args:
        items: as `order_for_batch` leaves them.
        block_size: tokens per block.
        before: those of the step before, which may draw tokens of this one.
        num_groups: of layers, the first of those for which sequences have tables.
    """
    starts = _column([item.start for item in items])
    counts = _column([item.num_tokens for item in items])
    draws = _column([item.num_draws for item in items])
    offsets = _column([item.sequence.position_offset for item in items])
    num_singles = int(((counts == 1) & (draws == 1)).sum())
    token_ids, sources = _tokens(items, num_singles, before)
    num_blocks = -(-(starts + counts) // block_size)
    blocks = np.frombuffer(_blocks(items, num_blocks.tolist(), num_groups), np.int32)
    positions, slots, tables, draw_rows, draw_positions = _lay_out(
        starts, counts, draws, offsets, blocks.reshape(num_groups, -1), num_blocks, block_size
    )
    return StepArrays(
        token_ids=token_ids,
        sources=sources,
        positions=positions,
        slots=slots,
        starts=starts,
        counts=counts,
        tables=tables,
        num_singles=num_singles,
        draw_rows=draw_rows,
        draw_positions=draw_positions,
    )


def compile_layout() -> None:
    """Have numba compile what lays a step out, or fetch it from its cache, before the first request needs it."""
    one = np.ones(1, dtype=np.int64)
    _lay_out(one, one, one, one, np.zeros((1, 1), np.int32), one, 2)


def rows_of(items: list[ScheduledSequence]) -> dict[str, int]:
    """Where a step with these items draws for each request: its first row among the draws."""
    firsts = accumulate([item.num_draws for item in items], initial=0)
    return {item.sequence.request_id: row for item, row in zip(items, firsts, strict=False) if item.num_draws}


def _column(values: list[int]) -> np.ndarray:
    return np.fromiter(values, np.int64, len(values))


def _tokens(
    items: list[ScheduledSequence], num_singles: int, before: list[ScheduledSequence]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and sources of the single ones; no others can be pending."""
    singles = [(item.sequence.token_ids, item.start) for item in items[:num_singles]]
    newest = _column([known[start] if start < len(known) else _PENDING for known, start in singles])
    sources = np.full(num_singles, -1)
    pending = np.flatnonzero(newest == _PENDING)
    if len(pending):
        row_of = rows_of(before)
        sources[pending] = [row_of[items[row].sequence.request_id] for row in pending.tolist()]
        newest[pending] = 0
    if num_singles == len(items):
        return newest, sources
    others = token_array()
    for item in items[num_singles:]:
        if item.is_decode:
            others.append(item.sequence.token_ids[item.start])
        else:
            others += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        others.extend(item.drafts)
    return np.concatenate((newest, np.frombuffer(others, np.uint32))), sources


def _blocks(items: list[ScheduledSequence], num_blocks: list[int], num_groups: int) -> "array[int]":
    """Of each run so many blocks: those of the first group behind each other, then those of the next."""
    flat = block_array()
    for item, size in zip(items, num_blocks, strict=True):
        flat += item.sequence.block_table[:size]
    for group in range(1, num_groups):
        for item, size in zip(items, num_blocks, strict=True):
            flat += item.sequence.tables.each[group][:size]
    return flat


# Compiled, for behind a step with drafts a GPU waits for it: numpy takes ten times as long, nearly all for calling.
@njit(cache=True)
def _lay_out(
    starts: np.ndarray,
    counts: np.ndarray,
    draws: np.ndarray,
    offsets: np.ndarray,
    blocks: np.ndarray,
    num_blocks: np.ndarray,
    block_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions, slots, tables, and rows and positions of draws: see `StepArrays`, as the first two.

    Args:
        starts: see there.
        counts: see there.
        draws: (R,) so many of each run's last tokens draw.
        offsets: (R,) `position_offset` of each run's sequence.
        blocks: (G, N) see `_blocks`.
        num_blocks: (R,) of each run.
        block_size: tokens per block.

    Source: PagedAttention (Kwon et al., SOSP 2023), section 4; `deployments/engine/kv/slots.py` does the same.
    """
    num_groups, num_runs, num_tokens, num_draws = len(blocks), len(starts), counts.sum(), draws.sum()
    positions, slots = np.empty(num_tokens, np.int64), np.empty((num_groups, num_tokens), np.int64)
    tables = np.zeros((num_groups, num_runs, num_blocks.max()), np.int64)
    draw_rows, draw_positions = np.empty(num_draws, np.int64), np.empty(num_draws, np.int64)
    first_block = token = draw = 0
    for run in range(num_runs):
        last_block = first_block + num_blocks[run]
        tables[:, run, : num_blocks[run]] = blocks[:, first_block:last_block]
        first_block = last_block
        for number in range(counts[run]):
            position = starts[run] + number
            positions[token] = position + offsets[run]
            block, place = position // block_size, position % block_size
            for group in range(num_groups):
                slots[group, token] = tables[group, run, block] * block_size + place
            if number >= counts[run] - draws[run]:
                draw_rows[draw], draw_positions[draw] = token, position + 1
                draw += 1
            token += 1
    return positions, slots, tables, draw_rows, draw_positions
