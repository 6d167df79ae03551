"""Changes logits before a draw: biases, penalties for tokens that were there before, stop tokens that may not come yet.

What is changed is a pure function of the request and of the tokens before the draw, so a hand-off, a preemption and a
resumed request change nothing. Steps without adjustments never come here.

A step names cells of its logits (draw, token) and changes them where they are on the device, those of all sequences at
once as long as they are few enough to take little memory. Penalties have many: see `penalties.py`. The token that the
step before draws is not known on the host when a pipelined engine asks for the next one: its cell names the draw, and
the device puts the token in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.sampling.penalties import MAX_CELLS, EarlierTokens, generate_less, repeat_less
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.upload import upload


@dataclass(frozen=True, slots=True)
class Cells:
    """C cells of a step's logits.

    Attributes:
        draws: (C,) int64 rows.
        tokens: (C,) int64 columns.
    """

    draws: np.ndarray
    tokens: np.ndarray

    def on(self, device: torch.device) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """The same on a device, so many at once: which of them, and where they are."""
        for start in range(0, len(self.draws), MAX_CELLS):
            piece = slice(start, start + MAX_CELLS)
            yield piece, (upload(self.draws[piece], device), upload(self.tokens[piece], device))


@dataclass(frozen=True, slots=True)
class Adjusting:
    """What one step changes.

    Attributes:
        biased: those that something is added to; none occurs twice.
        biases: (C,) float32 what that is.
        repeated: tokens before each draw, with its repetition penalty; K = 1.
        generated: those of them that were generated, with presence and frequency penalty; K = 2.
        barred: tokens that must not be drawn.
    """

    biased: Cells
    biases: np.ndarray
    repeated: EarlierTokens
    generated: EarlierTokens
    barred: Cells

    def on(self, drawn: Tensor) -> "DeviceAdjusting":
        """The same where `drawn`, (S,), is, while that still is what the step before draws."""
        penalizes = len(self.repeated) or len(self.generated)
        return DeviceAdjusting(self, drawn.clone() if penalizes else drawn)


@dataclass(frozen=True, slots=True)
class DeviceAdjusting:
    """What one step changes, and what the step before has drawn."""

    adjusting: Adjusting
    drawn: Tensor

    def apply(self, logits: Tensor) -> Tensor:
        """The changed logits.

        Args:
            logits: (S, vocab_size), any float dtype; left as they are.

        Returns:
            (S, vocab_size) float32.

        Source: repetition penalty from CTRL (Keskar et al., 2019), the other two from OpenAI's API reference. The order
        is vLLM's.
        """
        wanted = self.adjusting
        changed = logits.to(torch.float32, copy=True)
        for piece, places in wanted.biased.on(logits.device):
            changed[places] = changed[places] + upload(wanted.biases[piece], logits.device)
        repeat_less(changed, wanted.repeated, self.drawn)
        generate_less(changed, wanted.generated, self.drawn)
        for _, places in wanted.barred.on(logits.device):
            changed[places] = -torch.inf
        return changed


class _Cells:
    """Gathers cells, sequence by sequence."""

    def __init__(self) -> None:
        self._draws: list[np.ndarray] = [np.empty(0, np.int64)]
        self._tokens: list[np.ndarray] = [np.empty(0, np.int64)]

    def add(self, draws: range, tokens: Sequence[int]) -> None:
        """The same tokens of each of these draws."""
        self._draws.append(np.repeat(np.array(draws, np.int64), len(tokens)))
        self._tokens.append(np.tile(np.array(tokens, np.int64), len(draws)))

    def build(self) -> Cells:
        return Cells(np.concatenate(self._draws), np.concatenate(self._tokens))


class _Earlier:
    """Gathers what stands before draws, sequence by sequence.

    Args:
        num_values: K.
    """

    def __init__(self, num_values: int) -> None:
        self._num_values = num_values
        self._tokens: list[np.ndarray] = []
        self._draws: list[int] = []
        self._counts: list[int] = []
        self._owners: list[int] = []
        self._values: list[tuple[float, ...]] = []

    def add(self, draws: range, tokens: np.ndarray, *values: float) -> None:
        """Those of a sequence; behind the first draw each is behind one token more, the last one behind all."""
        if not len(tokens):
            return  # its first draw, and nothing was generated before
        self._draws += draws
        self._counts += range(len(tokens) - len(draws) + 1, len(tokens) + 1)
        self._owners += [len(self._tokens)] * len(draws)
        self._values += [values] * len(draws)
        self._tokens.append(tokens)

    def build(self) -> EarlierTokens:
        draws, owners, counts = np.array([self._draws, self._owners, self._counts], np.int64)
        values = np.array(self._values, np.float32).reshape(len(draws), self._num_values)
        return EarlierTokens(self._tokens, draws, owners, counts, values.T)


def build_adjusting(items: list[ScheduledSequence], sources: np.ndarray) -> Adjusting:
    """Name the cells that one step changes.

    Args:
        items: in the batch's order.
        sources: of the single tokens, as in `StepArrays`.
    """
    biased, repeated, generated, barred = _Cells(), _Earlier(1), _Earlier(2), _Cells()
    biases: list[float] = []
    draw = 0
    for place, item in enumerate(items):
        draws = range(draw, draw := draw + item.num_draws)
        sampling, num_prompt_tokens = item.sequence.request.sampling, len(item.sequence.request.prompt_token_ids)
        wanted = sampling.adjustments
        if wanted is None or not draws:
            continue
        if wanted.logit_bias:
            biased.add(draws, [token for token, _ in wanted.logit_bias])
            biases += [bias for _, bias in wanted.logit_bias] * len(draws)
        if (num_early := wanted.min_tokens - (item.first_draw - num_prompt_tokens)) > 0:
            barred.add(draws[:num_early], sampling.stop_token_ids)
        repetition, less = wanted.repetition_penalty, (wanted.presence_penalty, wanted.frequency_penalty)
        if repetition != 1 or any(less):
            before = _tokens_before(item, sources[place] if place < len(sources) else -1)
            if repetition != 1:
                repeated.add(draws, before, repetition)
            if any(less):
                generated.add(draws, before[num_prompt_tokens:], *less)
    return Adjusting(biased.build(), np.array(biases, np.float32), repeated.build(), generated.build(), barred.build())


def _tokens_before(item: ScheduledSequence, source: int) -> np.ndarray:
    """All tokens of a sequence that stand before the last of its draws, as `EarlierTokens` has them."""
    known = np.frombuffer(item.sequence.token_ids[: item.first_draw], np.int32)
    pending = [-1 - source] if len(known) < item.first_draw else []
    return np.concatenate((known, np.array([*pending, *item.drafts], np.int32)))
