"""Bars tokens before a draw that a grammar does not allow. Steps without grammars never come here.

The host has the masks of the sequences as bits (`grammar/`); they go to the device as such, for all sequences of a step
at once, and become places there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.upload import upload


@dataclass(frozen=True, slots=True)
class Masking:
    """The masks of M of a step's draws.

    Attributes:
        draws: (M,) int64 rows.
        allowed: (M, W) uint8 one bit for each token, the lowest first; bits behind the vocabulary count for nothing.
    """

    draws: np.ndarray
    allowed: np.ndarray

    @classmethod
    def of(cls, draws: Sequence[int], masks: Iterable[bytes]) -> Self:
        """Of these rows the masks, in the form in which sequences of the scheduler have them."""
        # A copy that may be written to: torch warns of memory that may not, when it is asked for a tensor of it.
        bits = np.frombuffer(bytearray().join(masks), np.uint8)
        return cls(np.array(draws), bits.reshape(len(draws), -1))

    def apply(self, logits: Tensor) -> Tensor:
        """The logits, minus infinity where a token must not be drawn.

        Args:
            logits: (S, vocab_size), any float dtype; left as they are.

        Returns:
            (S, vocab_size) of the same dtype.
        """
        barred = self._barred(logits.shape[1], logits.device)
        if len(self.draws) == len(logits):
            return logits.masked_fill(barred, -torch.inf)
        rows = upload(self.draws, logits.device)
        return logits.index_copy(0, rows, logits[rows].masked_fill_(barred, -torch.inf))

    def _barred(self, vocab_size: int, device: torch.device) -> Tensor:
        """(M, vocab_size) bool, from the bits."""
        if device.type == "cuda":
            packed = upload(self.allowed, device)
            bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=device)
            return (bits & 1).flatten(1)[:, :vocab_size] == 0
        barred = np.unpackbits(~self.allowed, axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(barred.view(bool))


def build_masking(items: list[ScheduledSequence]) -> Masking | None:
    """The masks of a step with these, in the batch's order; None: there is none."""
    draws: list[int] = []
    masks: list[bytes] = []
    draw = 0
    for item in items:
        mask = item.sequence.mask
        if mask is not None and item.num_draws:
            of_draws = (mask, *item.sequence.draft_masks[: len(item.drafts)])
            assert len(of_draws) == item.num_draws, f"{item.sequence.request_id}: {len(of_draws)} masks for {item}"
            draws += range(draw, draw + item.num_draws)
            masks += of_draws
        draw += item.num_draws
    return Masking.of(draws, masks) if draws else None
