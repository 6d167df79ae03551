"""Runs one scheduled step on the device: batch, forward pass, sampling. Owns the KV pool."""

import torch

from deployments.engine.attention.paged_decode import can_decode, compile_decode
from deployments.engine.attention.sdpa import SdpaStep
from deployments.engine.batch import build_batch, order_for_batch
from deployments.engine.kv_cache import KVCache
from deployments.engine.model import LoadedModel
from deployments.engine.sampler import build_sampling_batch, sample
from deployments.engine.scheduler import ScheduledSequence


class ModelRunner:
    """Executes steps; keeps no state of any sequence."""

    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self.cache = cache
        if can_decode(cache):
            compile_decode(cache)

    @torch.inference_mode()
    def execute(self, scheduled: list[ScheduledSequence]) -> list[tuple[ScheduledSequence, int | None]]:
        """Run a step.

        Args:
            scheduled: at least one run of tokens.

        Returns:
            Each item, in the batch's order, with the token drawn; None where the prompt is not yet at its end.
        """
        ordered = order_for_batch(scheduled)
        batch = build_batch(ordered, self.cache.block_size, self._device)
        logits = self._model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.logits_indices,
            paged_step=SdpaStep(self.cache, batch),
        ).logits[0]
        sampled = [item for item in ordered if item.samples]
        tokens = iter(())
        if sampled:
            sampling = build_sampling_batch(
                [item.sequence.request.sampling for item in sampled], [len(item.sequence.token_ids) for item in sampled]
            )
            tokens = iter(sample(logits, sampling).tolist())
        return [(item, next(tokens) if item.samples else None) for item in ordered]
