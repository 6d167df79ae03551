"""What every runner has: how a step is prepared, what a launched one is, what a runner promises. Knows no model."""

from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.batch.build import build_arrays, order_for_batch, rows_of
from deployments.engine.kv.cache import KVCache
from deployments.engine.sampling.adjusting import Adjusting, build_adjusting
from deployments.engine.sampling.sampler import SamplingBatch, SamplingPreparation
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.messages import DrawnToken, Draws


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """All that a runner has to know of a step.

    Attributes:
        items: what runs, in the batch's order.
        arrays: the same as numbers.
        sampling: how its S draws are made; None: there are none.
        adjusting: what is done to their logits before; None: nothing.
    """

    items: list[ScheduledSequence]
    arrays: StepArrays
    sampling: SamplingBatch | None
    adjusting: Adjusting | None


class Preparation:
    """Prepares steps one after the other, each of which may compute what the one before draws.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._row_of: dict[str, int] = {}
        self._sampling = SamplingPreparation()

    def prepare(self, scheduled: list[ScheduledSequence]) -> PreparedStep:
        """Lay out a step; tokens that are not known yet are those that the step prepared before draws."""
        items = order_for_batch(scheduled)
        arrays = build_arrays(items, self.block_size, self._row_of)
        self._row_of = rows_of(items)
        sampling = adjusting = None
        if len(arrays.draw_rows):
            params = [item.sequence.request.sampling for item in items for _ in range(item.num_draws)]
            sampling = self._sampling.prepare(params, arrays.draw_positions)
            if sampling.columns.is_adjusted:
                adjusting = build_adjusting(items, arrays.sources)
        return PreparedStep(items, arrays, sampling, adjusting)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that is under way.

    Attributes:
        items: what runs, in the batch's order.
        tokens: (S,) int64 what they draw, one behind the other; on the host once the step has ended, or still on the
            device.
        done: when it has ended; None where `launch` returns no earlier.
    """

    items: list[ScheduledSequence]
    tokens: Tensor
    done: torch.cuda.Event | None

    def collect(self) -> list[tuple[ScheduledSequence, Draws]]:
        """Wait for it: what ran, each with those of its draws that count."""
        if self.done is not None:
            self.done.synchronize()
        drawn = map(DrawnToken, self.tokens.tolist())
        collected = []
        for item in self.items:
            draws = (next(drawn),) if item.num_draws == 1 else tuple(islice(drawn, item.num_draws))
            collected.append((item, item.accept(draws) if item.drafts else draws))
        return collected


class Runner(Protocol):
    """Executes steps."""

    cache: KVCache

    def launch(self, scheduled: list[ScheduledSequence]) -> LaunchedStep:
        """Start a step.

        Args:
            scheduled: at least one run of tokens; pending ones are those that the step before draws.
        """
        ...
