"""Penalties for tokens that were there before, of a bounded number of cells (draw, token) at once.

A step may draw for hundreds of drafts behind contexts of 100,000 tokens: all those cells beside each other would take
gigabytes. Tokens of a sequence are uploaded once for its draws, each of which is behind some of them; what names the
cells is made of that on the device. Called by `adjusting.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.upload import upload

# Changed at once: less than 100 bytes each on the device, with what is left of those before them. One draw behind more
# tokens than that is not cut.
MAX_CELLS = 1 << 20


@dataclass(frozen=True, slots=True)
class EarlierTokens:
    """What stands before D draws, and how they are penalized for it.

    Attributes:
        tokens: int32, of each sequence; `-1 - row` is what the step before draws in that row.
        draws: (D,) int64 rows.
        owners: (D,) int64 whose tokens; those of a sequence follow each other, as their draws do.
        counts: (D,) int64 how many of them, from the first, stand before the draw.
        values: (K, D) float32 numbers for each, K by what is done with them.
    """

    tokens: list[np.ndarray]
    draws: np.ndarray
    owners: np.ndarray
    counts: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.draws)

    def cells(self, vocab_size: int, drawn: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them, piece by piece: no cell is in two.

        Args:
            vocab_size: how many cells a draw has.
            drawn: (S,) what the step before draws.
            device: where the logits are.

        Yields:
            (C,) int64 places in the flattened logits, those of tokens that stand there more than once as often; and
            (K, C) the numbers of each.
        """
        for piece in self._pieces():
            counts, owners, first = self.counts[piece], self.owners[piece], int(self.owners[piece.start])
            lists = self.tokens[first : int(owners[-1]) + 1]
            starts = np.cumsum([0, *map(len, lists[:-1])])[owners - first]
            behind = np.cumsum(counts)
            # A cell's token lies as far behind the first of its sequence as the cell behind the first of its draw.
            known = np.stack((counts, self.draws[piece] * vocab_size, starts - behind + counts))
            lengths, rows, shifts = upload(known, device)
            num_cells = int(behind[-1])
            of_cell = torch.repeat_interleave(lengths, output_size=num_cells)  # told how many, a GPU is not waited for
            places = torch.arange(num_cells, device=device) + shifts[of_cell]
            tokens = upload_tokens(np.concatenate(lists), drawn, device)[places]
            yield rows[of_cell] + tokens, upload(self.values[:, piece], device)[:, of_cell]

    def _pieces(self) -> Iterator[slice]:
        """Draws that are changed at once."""
        start = num_cells = 0
        for draw, count in enumerate(self.counts.tolist()):
            if start < draw and num_cells + count > MAX_CELLS:
                yield slice(start, draw)
                start, num_cells = draw, 0
            num_cells += count
        if start < len(self.counts):
            yield slice(start, len(self.counts))


def upload_tokens(tokens: np.ndarray, drawn: Tensor, device: torch.device) -> Tensor:
    """Tokens on a device, of which `-1 - row` is what the step before draws in that row: `drawn`, (S,)."""
    uploaded = upload(tokens, device)
    if not (tokens < 0).any():
        return uploaded
    return torch.where(uploaded < 0, drawn[(-1 - uploaded).clamp(min=0)], uploaded)


def repeat_less(logits: Tensor, earlier: EarlierTokens, drawn: Tensor) -> None:
    """Divide the logits of tokens that stand before a draw by its penalty, or multiply those below 0; K = 1.

    Args:
        logits: (S, vocab_size), written to.
        earlier: by the draw.
        drawn: what the step before draws.
    """
    flat = logits.view(-1)
    for places, (penalty,) in earlier.cells(logits.shape[1], drawn, logits.device):
        before = flat[places]
        # A cell that occurs twice is written twice, with the same number.
        flat[places] = torch.where(before > 0, before / penalty, before * penalty)


def generate_less(logits: Tensor, earlier: EarlierTokens, drawn: Tensor) -> None:
    """Take the first number from the logits of tokens that stand before a draw, the second as often as they do; K = 2.

    Arguments as those of `repeat_less`.
    """
    flat = logits.view(-1)
    for places, (presence, frequency) in earlier.cells(logits.shape[1], drawn, logits.device):
        flat[places] = flat[places] - presence
        # In whichever order a GPU adds: to a cell always the same number. `index_put_` would sort them, for memory.
        flat.index_add_(0, places, -frequency)
