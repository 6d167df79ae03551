"""How large the KV pool is, decided once at start-up from what is free; afterwards memory cannot run out."""

import os

import torch

from deployments.engine.config import EngineConfig, EngineLimits
from deployments.engine.model import LoadedModel

_CPU_POOL_BYTES = 1 << 30
_CPU_MEMORY_SHARE = 0.25
# Token budget per thread: a step of SmolLM2-135M then stays under a second (Zen 3, 2026-11), and so does an abort.
_CPU_TOKENS_PER_THREAD = 128
# The paged attention of torch reads blocks of a multiple of this.
_GPU_BLOCK_SIZE = 256
# What stays free on a GPU for activations, besides what is measured.
_GPU_MEMORY_SHARE = 0.9


def choose_limits(loaded: LoadedModel, config: EngineConfig) -> EngineLimits:
    """Turn wishes and what is there into bounds.

    Raises:
        ValueError: a wish cannot be met; names the value and the bound.
    """
    max_model_len = config.max_model_len or loaded.max_model_len
    if max_model_len > loaded.max_model_len:
        raise ValueError(f"max_model_len is {max_model_len}, the model takes at most {loaded.max_model_len}")
    on_cpu = loaded.device.type == "cpu"
    max_num_batched_tokens = config.max_num_batched_tokens or (
        _CPU_TOKENS_PER_THREAD * torch.get_num_threads() if on_cpu else 8192
    )
    if max_num_batched_tokens < config.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens is {max_num_batched_tokens}, must be at least max_num_seqs"
            f" ({config.max_num_seqs}), so that every sequence can get its token in each step"
        )
    block_size = config.block_size or (16 if on_cpu else _GPU_BLOCK_SIZE)
    if loaded.has_cuda_layers and block_size % _GPU_BLOCK_SIZE:
        raise ValueError(f"block_size is {block_size}, must be a multiple of {_GPU_BLOCK_SIZE} on a GPU")
    bytes_per_block = block_size * loaded.kv_shape.bytes_per_token
    num_blocks = config.num_blocks or (config.kv_cache_bytes or _default_pool_bytes(loaded.device)) // bytes_per_block
    if num_blocks < 1:
        raise ValueError(f"kv_cache_bytes is {config.kv_cache_bytes}, one block alone takes {bytes_per_block}")
    return EngineLimits(max_model_len, block_size, num_blocks, config.max_num_seqs, max_num_batched_tokens)


def _default_pool_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _GPU_MEMORY_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_POOL_BYTES, int(free * _CPU_MEMORY_SHARE))
