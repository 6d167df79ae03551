"""One step as plain numbers, from which every runner and every attention is fed. Knows no sequence and no tensor.

Shape suffixes: T tokens of the step, R runs, D single tokens among them, B blocks of the longest run, S draws, G groups
of layers, each of which has blocks of its own.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StepArrays:
    """The inputs of one step, a flat ragged batch of int64: runs lie behind each other, single tokens first.

    Attributes:
        token_ids: (T,) tokens; 0 where a step in flight draws them.
        sources: (D,) row among the draws of the step before, where it draws the single token; -1 where it is known.
        positions: (T,) within each sequence, plus the sequence's `position_offset`.
        slots: (G, T) where each token's KV goes in the flattened pool.
        starts: (R,) tokens of each run's sequence before the run.
        counts: (R,) tokens of each run.
        tables: (G, R, B) block ids that cover each run and everything before it, padded with zeros.
        num_singles: D, runs of one token that draws: a shape, see `order_for_batch`. Not all need be decodes.
        draw_rows: (S,) places in the batch of the tokens that draw.
        draw_positions: (S,) where the drawn tokens will stand in their sequences.
    """

    token_ids: np.ndarray
    sources: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    tables: np.ndarray
    num_singles: int
    draw_rows: np.ndarray
    draw_positions: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_runs(self) -> int:
        return len(self.counts)

    @property
    def num_decode_tokens(self) -> int:
        """Single tokens, and those of runs with drafts behind them: each of them draws, of a prompt the last alone."""
        is_prompts = self.draw_rows != np.arange(len(self.draw_rows))
        return int(is_prompts.argmax()) if is_prompts.any() else len(is_prompts)

    @property
    def single_lens(self) -> np.ndarray:
        """(D,) tokens of the sequence of each single token, itself included."""
        return self.starts[: self.num_singles] + 1

    @property
    def single_tables(self) -> np.ndarray:
        """(G, D, B) their blocks."""
        return self.tables[:, : self.num_singles]
