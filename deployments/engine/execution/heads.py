"""What runs a head that guesses for a model: the KV of tokens that are known, and guesses behind the newest of them.

A head has one layer, so KV takes what this asks of attention, and nothing behind it: that is computed of every token.
All the rest is computed of the newest token of a sequence alone, when somebody wants guesses. Knows no sequence; called
by the drafter, which says what is where. `portable_heads.py` does it anywhere, `cuda_heads.py` on a GPU by graphs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.slots import slots
from deployments.engine.sampling.guessing import GuessDraws


class KnownTokens(NamedTuple):
    """N tokens behind which the next one is known, all int64.

    Attributes:
        places: (N,) of their states among those of the step that computed them.
        token_ids: (N,) the tokens behind them.
        positions: (N,) among those that the head sees of their sequence.
        slots: (N,) where their KV goes.
    """

    places: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True, slots=True)
class NewestTokens:
    """The newest such tokens of S sequences, those first behind which the most is to be guessed; all int64.

    Attributes:
        places: (S,) of their states among those of the last step.
        token_ids: (S,) the tokens behind them.
        positions: (S,) as of `KnownTokens`.
        unseen: (S,) so many of the tokens before are seen no longer, of whole blocks.
        tables: (S, B) block ids of the others, and of what will be guessed.
        lengths: (S,) guesses that are wanted, descending to one at least.
    """

    places: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    unseen: np.ndarray
    tables: np.ndarray
    lengths: np.ndarray

    def first(self, count: int) -> "NewestTokens":
        """Of those sequences alone that come first."""
        return replace(self, **{name: getattr(self, name)[:count] for name in self.__slots__})

    def step(self, place: int, block_size: int) -> StepArrays:
        """What the guesses of one place are made by: a step of single tokens, whose ids are not told."""
        count = int((self.lengths > place).sum())
        positions, tables, rows = self.positions[:count] + place, self.tables[None, :count], np.arange(count)
        starts = positions - self.unseen[:count]
        return StepArrays(
            token_ids=np.zeros(count, np.int64),
            sources=np.full(count, -1),
            positions=positions,
            slots=slots(tables, rows, starts, block_size),
            starts=starts,
            counts=np.ones(count, np.int64),
            tables=tables,
            num_singles=count,
            draw_rows=rows,
            draw_positions=positions + 1,
        )

    def lists(self, places: list[list[int]]) -> list[list[int]]:
        """Guesses of each sequence, from those of each place."""
        return [[guesses[row] for guesses in places[:length]] for row, length in enumerate(self.lengths.tolist())]


class HeadRunner(Protocol):
    """Runs a head.

    Attributes:
        cache: of its KV, in blocks of the model's numbers.
    """

    cache: KVCache

    def learn(self, states: Tensor, known: KnownTokens) -> None:
        """Compute the KV of tokens.

        Args:
            states: (T, hidden_size), see `LaunchedStep`.
            known: at least one.
        """
        ...

    def guess(self, states: Tensor, newest: NewestTokens, draws: GuessDraws) -> list[list[int]]:
        """Guess behind the newest tokens; KV of those before them is there.

        Args:
            states: of the last step.
            newest: at least one.
            draws: for the same sequences.

        Returns:
            Of each sequence as many as are wanted; perhaps of the first ones alone.
        """
        ...
