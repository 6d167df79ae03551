"""Draws a head's guesses as the answers are drawn, so that chance makes the same choice among likely tokens."""

import numpy as np
from torch import Tensor

from deployments.engine.sampling.masking import Masking
from deployments.engine.sampling.sampler import SamplingPreparation, sample
from deployments.messages import SamplingParams


class GuessDraws:
    """How the guesses behind S sequences are drawn: the first ones of all, then the next ones of those in front.

    Args:
        preparation: of the draws before these, and of these.
        params: of each sequence.
        places: (S,) where its first guess would stand in it.
        masks: which tokens its grammar allows there; None: all. Later guesses are checked when they are tried.
    """

    def __init__(
        self,
        preparation: SamplingPreparation,
        params: list[SamplingParams],
        places: np.ndarray,
        masks: list[bytes | None],
    ) -> None:
        self._preparation, self._params, self._places = preparation, params, places
        self._draws_likeliest = not any(param.temperature for param in params)
        self._masks = [(row, mask) for row, mask in enumerate(masks) if mask is not None]

    def draws_likeliest(self, place: int) -> bool:
        """Whether all guesses of this place, from 0 on, are the likeliest tokens."""
        return self._draws_likeliest and (place > 0 or not self._masks)

    def draw(self, place: int, logits: Tensor) -> Tensor:
        """(N,) int64 of the first N sequences, from their logits, (N, vocab_size)."""
        count = len(logits)
        batch = self._preparation.prepare(self._params[:count], self._places[:count] + place)
        masks = [] if place else [(row, mask) for row, mask in self._masks if row < count]
        if masks:
            rows, allowed = zip(*masks, strict=True)
            logits = Masking.of(rows, allowed).apply(logits)
        return sample(logits, batch)
