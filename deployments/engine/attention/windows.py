"""Attention with a window by kernels that have none: as causal attention of pieces, and of pieces read backwards.

Queries are cut into tiles as long as the window. A query sees its own tile up to itself, which is causal, and of the
tile before what lies behind its counterpart there. Read backwards, that is causal too. Both parts are merged by their
log-sum-exp, and nothing that the window hides is computed. Knows no kernel; plans are arrays of numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.upload import upload


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces that attend causally; with fewer queries than keys these are the last ones.

    Attributes:
        starts: (N + 1,) int32 where the queries of each piece begin.
        key_starts: (N + 1,) int32 where its keys begin.
        max_queries: of one piece.
        max_keys: of one piece.
    """

    starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How some sequences attend within a window.

    Attributes:
        forwards: every query, with what it sees of its own tile.
        backwards: those that see something of the tile before, last ones first.
        rows: (M,) int64 queries of the pieces read backwards.
        keys: (L,) int64 keys of them.
    """

    forwards: Pieces
    backwards: Pieces
    rows: Tensor
    keys: Tensor


# Of queries, keys and values: the output and the log-sum-exp of the scores, (num_heads, T) float32.
Attend = Callable[[Tensor, Tensor, Tensor, Pieces], tuple[Tensor, Tensor]]
# (out, lse, other, other_lse, rows): puts the other output, of these rows, into the first, in place.
Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def plan_window(sequences: Sequence[tuple[int, int]], window: int, device: torch.device) -> WindowPlan:
    """Plan the attention of sequences of which one at least is longer than the window.

    Args:
        sequences: (computed before, new) tokens of each. Either nothing was computed before, and the keys are those of
            the new tokens, behind each other; or it is one sequence, and its keys begin with `first_key`.
        window: in tokens.
        device: where the plan goes, without a wait.
    """
    counts, key_counts, rows, keys, back_counts = [], [], [], [], []
    first = first_key(sequences[0][0], window) if len(sequences) == 1 else 0
    row = key = 0  # of the sequence's first token, and of its first key
    offset = None
    for context, count in sequences:
        end, begin = context + count, context
        while begin < end:
            stop = min(end, begin + window if begin >= window else window)
            # Up to the window's length all keys are seen, later ones those of the own tile.
            since = begin if begin >= window else 0
            offset = since - first if offset is None else offset
            counts.append(stop - begin)
            key_counts.append(stop - since)
            if begin >= window:
                rows.append(np.arange(stop - 1, begin - 1, -1) - context + row)
                keys.append(np.arange(begin - 1, begin - window, -1) - first + key)
                back_counts.append(stop - begin)
            begin = stop
        row += count
        key += end - first
    assert rows, f"nothing of {sequences} is hidden by a window of {window}"
    numbers = (*_starts(counts), *_starts(key_counts, offset or 0), *_starts(back_counts))
    numbers += tuple(_starts([window - 1] * len(back_counts)))
    n, m = len(counts) + 1, len(back_counts) + 1
    starts, key_starts, back_starts, back_key_starts = upload(np.array(numbers, np.int32), device).split((n, n, m, m))
    order = upload(np.concatenate((*rows, *keys)), device)
    num_rows = sum(back_counts)
    return WindowPlan(
        Pieces(starts, key_starts, max(counts), max(key_counts)),
        Pieces(back_starts, back_key_starts, max(back_counts), window - 1),
        order[:num_rows],
        order[num_rows:],
    )


def first_key(context: int, window: int) -> int:
    """The first key that a chunk behind so many tokens sees."""
    return max(0, context - window + 1)


def attend_window(
    queries: Tensor, keys: Tensor, values: Tensor, plan: WindowPlan, attend: Attend, merge: Merge
) -> tuple[Tensor, Tensor]:
    """Attend as planned.

    Args:
        queries: (T, num_heads, head_dim).
        keys: (K, num_kv_heads, head_dim), see `plan_window`; there may be more behind them.
        values: as the keys.
        plan: of these sequences.
        attend: of pieces.
        merge: of both parts.

    Returns:
        Output, as the queries, and log-sum-exp, (num_heads, T) float32.
    """
    out, lse = attend(queries, keys, values, plan.forwards)
    reverse = queries.index_select(0, plan.rows), keys.index_select(0, plan.keys), values.index_select(0, plan.keys)
    merge(out, lse, *attend(*reverse, plan.backwards), plan.rows)
    return out, lse


def _starts(counts: list[int], first: int = 0) -> list[int]:
    return [first, *(np.cumsum(counts) + first).tolist()]
