"""Changes logits before a draw: biases, penalties for tokens that were there before, stop tokens that may not come yet.

What is changed is a pure function of the request and of the tokens before the draw, so a hand-off, a preemption and a
resumed request change nothing. Steps without adjustments never come here.

A step names cells of its logits (draw, token) and changes them where they are on the device, all sequences at once. The
token that the step before draws is not known on the host when a pipelined engine asks for the next one: its cell names
the draw, and the device puts the token in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.upload import upload


@dataclass(frozen=True, slots=True)
class Cells:
    """C cells of a step's logits, some perhaps more than once.

    Attributes:
        draws: (C,) int64 rows.
        tokens: (C,) int64 columns; `-1 - row` is what the step before draws in that row.
        values: (K, C) float32 numbers for each, K by what is done with them.
    """

    draws: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.draws)

    def on(self, device: torch.device, drawn: Tensor) -> "DeviceCells":
        """The same on a device; `drawn`: (S,) what the step before draws."""
        tokens = upload(self.tokens, device)
        if (self.tokens < 0).any():
            tokens = torch.where(tokens < 0, drawn[(-1 - tokens).clamp(min=0)], tokens)
        return DeviceCells((upload(self.draws, device), tokens), upload(self.values, device))


@dataclass(frozen=True, slots=True)
class DeviceCells:
    """See `Cells`; all tokens are known.

    Attributes:
        places: (C,) draws and (C,) tokens.
        values: (K, C).
    """

    places: tuple[Tensor, Tensor]
    values: Tensor


@dataclass(frozen=True, slots=True)
class Adjusting:
    """What one step changes.

    Attributes:
        biased: what is added to each; of K = 1. No cell occurs twice.
        repeated: tokens before each draw, with its repetition penalty; K = 1.
        generated: those of them that were generated, as often as they were, with presence and frequency penalty; K = 2.
        barred: tokens that must not be drawn; K = 0.
    """

    biased: Cells
    repeated: Cells
    generated: Cells
    barred: Cells

    def on(self, device: torch.device, drawn: Tensor) -> "DeviceAdjusting":
        """The same on a device; while `drawn` still is what the step before draws."""
        cells = self.biased, self.repeated, self.generated, self.barred
        return DeviceAdjusting(*(c.on(device, drawn) if len(c) else None for c in cells))


@dataclass(frozen=True, slots=True)
class DeviceAdjusting:
    """See `Adjusting`; None: no such cell."""

    biased: DeviceCells | None
    repeated: DeviceCells | None
    generated: DeviceCells | None
    barred: DeviceCells | None

    def apply(self, logits: Tensor) -> Tensor:
        """The changed logits.

        Args:
            logits: (S, vocab_size), any float dtype; left as they are.

        Returns:
            (S, vocab_size) float32.

        Source: repetition penalty from CTRL (Keskar et al., 2019), the other two from OpenAI's API reference. The order
        is vLLM's.
        """
        changed = logits.to(torch.float32, copy=True)
        if self.biased is not None:
            changed.index_put_(self.biased.places, self.biased.values[0], accumulate=True)
        if self.repeated is not None:
            before, penalty = changed[self.repeated.places], self.repeated.values[0]
            # A cell that occurs twice is written twice, with the same number.
            changed.index_put_(self.repeated.places, torch.where(before > 0, before / penalty, before * penalty))
        if self.generated is not None:
            presence, frequency = self.generated.values
            changed.index_put_(self.generated.places, changed[self.generated.places] - presence)
            changed.index_put_(self.generated.places, -frequency, accumulate=True)
        if self.barred is not None:
            changed[self.barred.places] = -torch.inf
        return changed


class _Builder:
    """Gathers cells, draw by draw.

    Args:
        num_values: K.
    """

    def __init__(self, num_values: int) -> None:
        self._num_values = num_values
        self._draws: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, draw: int, tokens: Sequence[int] | np.ndarray, *values: float | Sequence[float]) -> None:
        """Tokens of a draw, with values for each or one for all."""
        self._draws.append(draw)
        self._tokens.append(np.asarray(tokens, np.int64))
        columns = [np.broadcast_to(np.asarray(value, np.float32), len(tokens)) for value in values]
        self._values.append(np.stack(columns) if columns else np.empty((0, len(tokens)), np.float32))

    def build(self) -> Cells:
        if not self._draws:
            return Cells(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((self._num_values, 0), np.float32))
        draws = np.repeat(np.array(self._draws), [len(tokens) for tokens in self._tokens])
        return Cells(draws, np.concatenate(self._tokens), np.concatenate(self._values, axis=1))


def build_adjusting(items: list[ScheduledSequence], sources: np.ndarray) -> Adjusting:
    """Name the cells that one step changes.

    Args:
        items: in the batch's order.
        sources: of the single tokens, as in `StepArrays`.
    """
    biased, repeated, generated, barred = _Builder(1), _Builder(1), _Builder(2), _Builder(0)
    draw = 0
    for place, item in enumerate(items):
        sampling, num_prompt_tokens = item.sequence.request.sampling, len(item.sequence.request.prompt_token_ids)
        wanted = sampling.adjustments
        if wanted is None:
            draw += item.num_draws
            continue
        for number in range(item.num_draws):
            if wanted.logit_bias:
                biased.add(draw, *zip(*wanted.logit_bias, strict=True))
            if item.first_draw + number - num_prompt_tokens < wanted.min_tokens:
                barred.add(draw, sampling.stop_token_ids)
            before = _tokens_before(item, number, sources[place] if place < len(sources) else -1)
            if wanted.repetition_penalty != 1:
                repeated.add(draw, before, wanted.repetition_penalty)
            if wanted.presence_penalty or wanted.frequency_penalty:
                generated.add(draw, before[num_prompt_tokens:], wanted.presence_penalty, wanted.frequency_penalty)
            draw += 1
    return Adjusting(biased.build(), repeated.build(), generated.build(), barred.build())


def _tokens_before(item: ScheduledSequence, number: int, source: int) -> np.ndarray:
    """All tokens of a sequence that stand before one of its draws, as `Cells` has them."""
    known = np.frombuffer(item.sequence.token_ids[: item.first_draw], np.uint32).astype(np.int64)
    pending = [-1 - source] if len(known) < item.first_draw else []
    return np.concatenate((known, np.array([*pending, *item.drafts[:number]], np.int64)))
