"""Runs one scheduled step on the device: batch, forward pass, sampling. Owns the KV pool."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deployments.engine.attention.paged import compile_kernels, has_kernels
from deployments.engine.attention.sdpa import SdpaStep
from deployments.engine.batch.build import build_batch, order_for_batch
from deployments.engine.config import EngineLimits
from deployments.engine.kv.cache import KVCache
from deployments.engine.model.load import LoadedModel
from deployments.engine.sampling.sampler import build_sampling_batch, compile_draws, sample
from deployments.engine.scheduling.scheduler import ScheduledSequence
from deployments.engine.scheduling.sequence import PENDING


class LaunchedStep(Protocol):
    """A step that is under way.

    Attributes:
        items: what runs, in the batch's order.
        done: when it has ended; None where `launch` returns no earlier.
    """

    @property
    def items(self) -> list[ScheduledSequence]: ...

    @property
    def done(self) -> torch.cuda.Event | None: ...

    def collect(self) -> list[tuple[ScheduledSequence, int | None]]:
        """Wait for it: what ran, each with the token drawn; None where the prompt is not yet at its end."""
        ...


class Runner(Protocol):
    """Executes steps."""

    cache: KVCache

    def launch(self, scheduled: list[ScheduledSequence]) -> LaunchedStep:
        """Start a step.

        Args:
            scheduled: at least one run of tokens; pending ones are those that the step before draws.
        """
        ...


def build_runner(loaded: LoadedModel, cache: KVCache, limits: EngineLimits) -> Runner:
    """The fastest runner there is for a model where it is."""
    if not loaded.has_cuda_layers:
        return ModelRunner(loaded, cache)
    from deployments.engine.execution.cuda import CudaRunner  # Triton is there only where a GPU is

    return CudaRunner(loaded, cache, limits)


@dataclass(frozen=True, slots=True)
class _Launched:
    """`LaunchedStep` with the tokens of those items that draw one, (S,) on the device."""

    items: list[ScheduledSequence]
    tokens: Tensor
    done: torch.cuda.Event | None

    def collect(self) -> list[tuple[ScheduledSequence, int | None]]:
        tokens = iter(self.tokens.tolist())
        return [(item, next(tokens) if item.samples else None) for item in self.items]


class ModelRunner:
    """Executes steps of any model on any device. It only remembers for which sequences the last step drew a token."""

    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self.cache = cache
        self._drawn = torch.empty(0, dtype=torch.int64)
        self._row_of: dict[str, int] = {}
        if has_kernels(cache):
            compile_kernels(cache)
        compile_draws(loaded.vocab_size, loaded.model.dtype, loaded.device)

    @torch.inference_mode()
    def launch(self, scheduled: list[ScheduledSequence]) -> LaunchedStep:
        ordered = order_for_batch(scheduled)
        batch = build_batch(ordered, self.cache.block_size, self._device)
        logits = self._model(
            input_ids=self._fill_pending(batch.input_ids, ordered).unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.logits_indices,
            paged_step=SdpaStep(self.cache, batch),
        ).logits[0]
        sampled = [item for item in ordered if item.samples]
        tokens = torch.empty(0, dtype=torch.int64)
        if sampled:
            sampling = build_sampling_batch(
                [item.sequence.request.sampling for item in sampled], [item.start + item.num_tokens for item in sampled]
            )
            tokens = sample(logits, sampling)
        self._drawn, self._row_of = tokens, {item.sequence.request_id: row for row, item in enumerate(sampled)}
        done = torch.cuda.current_stream().record_event() if self._device.type == "cuda" else None
        return _Launched(ordered, tokens, done)

    def _fill_pending(self, input_ids: Tensor, ordered: list[ScheduledSequence]) -> Tensor:
        """Put in what the step before drew, without waiting for it. Only decodes, which come first, can be pending."""
        pending = [i for i, item in enumerate(ordered) if item.sequence.token_ids[item.start] == PENDING]
        if pending:
            rows = [self._row_of[ordered[i].sequence.request_id] for i in pending]
            input_ids[pending] = self._drawn[rows]
        return input_ids
