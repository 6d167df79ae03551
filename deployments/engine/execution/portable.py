"""Runs one scheduled step of any model on any device: forward pass, sampling."""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from deployments.engine.attention.paged import compile_kernels, has_kernels
from deployments.engine.attention.sdpa import SdpaStep
from deployments.engine.config import EngineLimits
from deployments.engine.execution.base import LaunchedStep, Preparation, PreparedStep, Runner
from deployments.engine.execution.looking import decoder_layers, looking_at
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.model.load import LoadedModel
from deployments.engine.sampling.sampler import compile_draws, sample
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.upload import upload


def build_runner(loaded: LoadedModel, cache: KVCache, limits: EngineLimits) -> Runner:
    """The fastest runner there is for a model where it is."""
    if not loaded.has_cuda_layers:
        return ModelRunner(loaded, cache)
    from deployments.engine.execution.cuda import CudaRunner  # Triton is there only where a GPU is

    return CudaRunner(loaded, cache, limits)


class ModelRunner:
    """Executes steps of any model on any device; see `Runner`."""

    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self._head = loaded.head
        self._looked_at = [] if loaded.head is None else decoder_layers(loaded.model, loaded.head.layers)
        self.cache = cache
        self._preparation = Preparation(cache)
        self._drawn = torch.empty(0, dtype=torch.int64)
        if has_kernels(cache):
            compile_kernels(cache)
        compile_draws(loaded.vocab_size, loaded.model.dtype, loaded.device)

    @torch.inference_mode()
    def launch(self, scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        step = self._preparation.prepare(scheduled)
        arrays, logit_rows, drawn = step.arrays, step.logit_rows, self._drawn
        seen: list[Tensor] = []
        with nullcontext(seen) if self._head is None else looking_at(self._looked_at) as seen:
            logits = self._model(
                input_ids=self._token_ids(step).unsqueeze(0),
                position_ids=upload(arrays.positions, self._device).unsqueeze(0),
                use_cache=False,
                logits_to_keep=upload(logit_rows, self._device),
                paged_step=SdpaStep(self.cache, arrays, logit_rows, watch),
            ).logits[0]
        to_draw = logits if step.scoring is None else logits[: len(arrays.draw_rows)]
        if step.adjusting is not None:
            to_draw = step.adjusting.on(drawn).apply(to_draw)
        if step.masking is not None:
            to_draw = step.masking.apply(to_draw)
        self._drawn = torch.empty(0, dtype=torch.int64) if step.sampling is None else sample(to_draw, step.sampling)
        scores = None if step.scoring is None else step.scoring.score(logits, self._drawn)
        done = torch.cuda.current_stream().record_event() if self._device.type == "cuda" else None
        states = None if self._head is None else self._head.fuse(seen[0])
        return LaunchedStep(step.items, self._drawn, done, scores, states)

    def _token_ids(self, step: PreparedStep) -> Tensor:
        """With what the step before drew, without waiting for it."""
        token_ids, sources = upload(step.arrays.token_ids, self._device), step.arrays.sources
        pending = np.flatnonzero(sources >= 0)
        if len(pending):
            rows = upload(sources[pending], self._device)
            token_ids = token_ids.index_copy(0, upload(pending, self._device), self._drawn[rows])
        return token_ids
