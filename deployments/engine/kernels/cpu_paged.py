"""Attention of a step over a paged pool: its single tokens, then its chunks one after the other; float32 on a CPU.

numba keeps it with all that it calls, other files' too.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import numpy as np

from deployments.engine.compiled import njit
from deployments.engine.kernels.cpu import PARALLEL
from deployments.engine.kernels.cpu_attention import decode_attention
from deployments.engine.kernels.cpu_prompt import prompt_attention

_FLOAT = np.float32


class Runs(NamedTuple):
    """Where the tokens of a step's runs are, and how the sequences of its single tokens are cut; all int64.

    Attributes:
        starts: (R,) tokens before each run.
        counts: (R,) tokens of each run.
        tables: (R, B) block ids of its sequence.
        splits: (S, 3) see `decode_attention`.
        first_split: (D + 1,) see `decode_attention`; the first D runs are single tokens.
    """

    starts: np.ndarray
    counts: np.ndarray
    tables: np.ndarray
    splits: np.ndarray
    first_split: np.ndarray


@njit(cache=PARALLEL, nogil=True)
def attend_runs(queries, keys, values, runs, window, scaling, out):
    """Attend in one layer.

    Args:
        queries: (T, H, head_dim), of all runs behind each other.
        keys: (num_blocks, block_size, H_kv, head_dim), contiguous; the T tokens' own are there.
        values: as the keys.
        runs: a `Runs`.
        window: a prompt's token sees itself and this many less one before it; the splits say it of single tokens.
        scaling: of the scores.
        out: as queries, filled.
    """
    num_singles, num_splits = runs.first_split.shape[0] - 1, runs.splits.shape[0]
    if num_singles > 0:
        _, num_heads, head_dim = queries.shape
        parts = np.empty((num_splits, num_heads, head_dim), _FLOAT)
        peaks, sums = np.empty((num_splits, num_heads), _FLOAT), np.empty((num_splits, num_heads), _FLOAT)
        decode_attention(
            queries[:num_singles],
            keys,
            values,
            runs.tables[:num_singles],
            runs.splits,
            runs.first_split,
            scaling,
            parts,
            peaks,
            sums,
            out[:num_singles],
        )
    first = num_singles
    for run in range(num_singles, runs.counts.shape[0]):
        last = first + runs.counts[run]
        prompt_attention(
            queries[first:last], keys, values, runs.tables[run], runs.starts[run], window, scaling, out[first:last]
        )
        first = last
