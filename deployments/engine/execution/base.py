"""What every runner has: how a step is prepared, what a launched one is, what a runner promises. Knows no model."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.batch.build import build_arrays, compile_layout, order_for_batch
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.sampling.adjusting import Adjusting, build_adjusting
from deployments.engine.sampling.masking import Masking, build_masking
from deployments.engine.sampling.sampler import SamplingBatch, SamplingPreparation
from deployments.engine.sampling.scoring import Scores, Scoring, build_scoring
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
        masking: which tokens are barred from them after that; None: none.
        scoring: which tokens are told with logprobs; None: none.
    """

    items: list[ScheduledSequence]
    arrays: StepArrays
    sampling: SamplingBatch | None
    adjusting: Adjusting | None
    masking: Masking | None
    scoring: Scoring | None

    @property
    def logit_rows(self) -> np.ndarray:
        """Places in the batch of the tokens whose logits are wanted: (S,) that draw, then those that score."""
        if self.scoring is None:
            return self.arrays.draw_rows
        return np.concatenate((self.arrays.draw_rows, self.scoring.rows))


class Preparation:
    """Prepares steps one after the other, each of which may compute what the one before draws.

    Args:
        cache: the pool.
    """

    def __init__(self, cache: KVCache) -> None:
        self._block_size, self._num_groups = cache.block_size, cache.num_groups
        self._before: list[ScheduledSequence] = []
        compile_layout()
        self._sampling = SamplingPreparation()

    def prepare(self, scheduled: list[ScheduledSequence]) -> PreparedStep:
        """Lay out a step; tokens that are not known yet are those that the step prepared before draws."""
        items = order_for_batch(scheduled)
        arrays = build_arrays(items, self._block_size, self._before, self._num_groups)
        self._before = items
        sampling = adjusting = masking = scoring = None
        if len(arrays.draw_rows):
            drawing = [item for item in items if item.num_draws]
            params = [item.sequence.request.sampling for item in drawing]
            sampling = self._sampling.prepare(params, arrays.draw_positions, [item.num_draws for item in drawing])
            if sampling.columns.is_adjusted:
                adjusting = build_adjusting(items, arrays.sources)
            if sampling.columns.is_guided:
                masking = build_masking(items)
            if sampling.columns.is_scored:
                scoring = build_scoring(items)
        if scoring is None and len(items) > arrays.num_singles and any(item.num_scored for item in items):
            scoring = build_scoring(items)
        return PreparedStep(items, arrays, sampling, adjusting, masking, scoring)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that is under way.

    Attributes:
        items: what runs, in the batch's order.
        tokens: (S,) int64 what they draw, one behind the other; on the host once the step has ended, or still on the
            device.
        done: when it has ended; None where `launch` returns no earlier.
        scores: of what it draws and of prompts; None: nobody asked.
        states: (T, hidden_size) what a head that guesses has fused of the states of each token, in the batch's order;
            None: there is none.
    """

    items: list[ScheduledSequence]
    tokens: Tensor
    done: torch.cuda.Event | None
    scores: Scores | None = None
    states: Tensor | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum([item.num_prompt_tokens for item in self.items if not item.is_decode])

    def collect(self) -> list[tuple[ScheduledSequence, Draws]]:
        """Wait for it: what ran, each with those of its draws that count."""
        if self.done is not None:
            self.done.synchronize()
        tokens = self.tokens.tolist()
        scored = None if self.scores is None else self.scores.of_draws(tokens)
        collected: list[tuple[ScheduledSequence, Draws]] = []
        first = 0
        for item in self.items:
            last = first + (item.num_counted(tokens, first) if item.drafts else item.num_draws)
            draws = tuple(map(DrawnToken, tokens[first:last])) if scored is None else tuple(scored[first:last])
            collected.append((item, draws))
            first += item.num_draws
        return collected

    def collect_prompts(self) -> list[tuple[ScheduledSequence, Draws]]:
        """After `collect`: runs that scored tokens of their prompts, each with those behind its tokens."""
        return [] if self.scores is None else self.scores.of_prompts(self.items)


class Runner(Protocol):
    """Executes steps."""

    cache: KVCache

    def launch(self, scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        """Start a step.

        Args:
            scheduled: at least one run of tokens; pending ones are those that the step before draws.
            watch: is told how far the step has come, or nothing, where the runner cannot tell; None: nobody is.
        """
        ...
