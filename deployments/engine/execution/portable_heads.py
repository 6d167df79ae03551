"""Runs a head that guesses for a model, of any kind on any device."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from deployments.engine.attention.paged import compile_kernels, has_kernels
from deployments.engine.attention.sdpa import SdpaStep
from deployments.engine.config import EngineLimits
from deployments.engine.execution.heads import HeadRunner, KnownTokens, NewestTokens
from deployments.engine.kv.cache import KVCache
from deployments.engine.model.eagle3 import Eagle3Head
from deployments.engine.model.load import LoadedModel
from deployments.engine.sampling.guessing import GuessDraws
from deployments.engine.upload import upload


def build_head_runner(loaded: LoadedModel, limits: EngineLimits) -> HeadRunner:
    """The fastest one there is for a model's head where it is."""
    assert loaded.head is not None
    if not loaded.head.leaves_rotary:
        return PortableHead(loaded.head, limits, loaded.device)
    from deployments.engine.execution.cuda_heads import CudaHead  # Triton is there only where a GPU is

    return CudaHead(loaded.head, limits, loaded.device)


class PortableHead:
    """Runs a head on any device; see `HeadRunner`."""

    def __init__(self, head: Eagle3Head, limits: EngineLimits, device: torch.device) -> None:
        self._head, self._device = head, device
        self.cache = KVCache(head.kv_shape, limits.num_blocks, limits.block_size, device)
        if has_kernels(self.cache):
            compile_kernels(self.cache)

    @torch.inference_mode()
    def learn(self, states: Tensor, known: KnownTokens) -> None:
        places, token_ids, positions, slot_mapping = self._upload(known)
        asked = self._head.ask(states[places], token_ids, positions)
        self.cache.write(0, slot_mapping, asked.keys.transpose(0, 1), asked.values.transpose(0, 1))

    @torch.inference_mode()
    def guess(self, states: Tensor, newest: NewestTokens, draws: GuessDraws) -> list[list[int]]:
        places, token_ids = self._upload((newest.places, newest.token_ids))
        states, guessed = states[places], []
        for place in range(int(newest.lengths[0])):
            arrays = newest.step(place, self.cache.block_size)
            states, token_ids = states[: arrays.num_tokens], token_ids[: arrays.num_tokens]
            (positions,) = self._upload((arrays.positions,))
            states = self._head(states, token_ids, positions, SdpaStep(self.cache, arrays))
            token_ids = draws.draw(place, self._head.logits(states))
            guessed.append(token_ids)
        return newest.lists([tokens.tolist() for tokens in guessed])

    def _upload(self, values: Iterable[np.ndarray]) -> list[Tensor]:
        return [upload(array, self._device) for array in values]
