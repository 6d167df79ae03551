"""How large the KV pool is, decided once at start-up; afterwards memory cannot run out.

On a GPU the largest steps are run before (`rehearsal.py`), with the layers, graphs and draws of this very model, beside
a pool of a few blocks. The pool takes what is free beside all that, less what hand-offs need and a margin.
"""

import logging
from dataclasses import dataclass, replace

import torch

from deployments.engine.config import EngineConfig, EngineLimits
from deployments.engine.execution.memory import available_memory, total_memory
from deployments.engine.execution.rehearsal import free_beside_largest_steps, name_limits
from deployments.engine.model.load import LoadedModel
from deployments.engine.scheduling.retention import Retention
from deployments.errors import LimitsError

_CPU_POOL_BYTES = 1 << 30
_CPU_MEMORY_SHARE = 0.25
# Token budget per thread: a step of SmolLM2-135M then stays under a second (Zen 3, 2026-11), and so does an abort.
_CPU_TOKENS_PER_THREAD = 128
# The paged attention of torch reads blocks of a multiple of this.
_GPU_BLOCK_SIZE = 256
# What stays free on a GPU besides what was measured: for communicators of NCCL, others' contexts, memory in pieces.
_MARGIN_BYTES = 1 << 30
# Places of tokens in the pool are int32 on a GPU.
_MAX_SLOTS = 2**31 - 1
# Of the pool beside which steps are tried; its blocks are used again and again.
_TRIAL_BLOCKS = 2

_GIB = 1 << 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportRoom:
    """What hand-offs need beside the pool.

    Attributes:
        max_chunk_blocks: of one chunk.
        max_blocks: of all that may wait for their receivers; one chunk more is let in.
        bytes_per_block: of one.
    """

    max_chunk_blocks: int
    max_blocks: int
    bytes_per_block: int

    @property
    def num_blocks(self) -> int:
        """With those that are on their way into the pool, or dropped and not yet noticed to be."""
        return self.max_blocks + _SPARE_CHUNKS * self.max_chunk_blocks

    @property
    def max_bytes(self) -> int:
        return self.max_blocks * self.bytes_per_block

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block


# Chunks of this many steps may wait for their receivers while the next ones are computed. Steps of a GPU are long.
_EXPORT_STEPS = {"cpu": 4, "cuda": 2}
# Of one chunk: small enough that chunks of one step overlap on their way, large enough that each fills a link.
_MAX_CHUNK_BYTES = 256 << 20
# A chunk outlives its release by as long as Ray takes to notice that nobody refers to it any more.
_SPARE_CHUNKS = 4


def export_room(limits: EngineLimits, bytes_per_block: int, device: torch.device, hands_over: bool) -> ExportRoom:
    """For as many chunks as may be under way at once; without handing over, from others to here."""
    step_blocks = max(1, limits.max_num_batched_tokens // limits.block_size)
    max_chunk_blocks = max(1, min(step_blocks, _MAX_CHUNK_BYTES // bytes_per_block))
    max_blocks = _EXPORT_STEPS[device.type] * step_blocks if hands_over else 0
    return ExportRoom(max_chunk_blocks, max_blocks, bytes_per_block)


def choose_limits(loaded: LoadedModel, config: EngineConfig) -> EngineLimits:
    """Turn wishes and what is there into bounds.

    Raises:
        LimitsError: a wish cannot be met; names the value and the bound.
    """
    max_model_len = config.max_model_len or loaded.max_model_len
    if max_model_len > loaded.max_model_len:
        raise LimitsError(f"max_model_len is {max_model_len}, the model takes at most {loaded.max_model_len}")
    on_cpu = loaded.device.type == "cpu"
    max_num_batched_tokens = config.max_num_batched_tokens or (
        _CPU_TOKENS_PER_THREAD * torch.get_num_threads() if on_cpu else 8192
    )
    if max_num_batched_tokens < config.max_num_seqs:
        raise LimitsError(
            f"max_num_batched_tokens is {max_num_batched_tokens}, must be at least max_num_seqs"
            f" ({config.max_num_seqs}), so that every sequence can get its token in each step"
        )
    block_size = config.block_size or (16 if on_cpu else _GPU_BLOCK_SIZE)
    has_cuda_layers = loaded.has_cuda_layers or (loaded.drafter is not None and loaded.drafter.has_cuda_layers)
    if has_cuda_layers and block_size % _GPU_BLOCK_SIZE:
        raise LimitsError(f"block_size is {block_size}, must be a multiple of {_GPU_BLOCK_SIZE} on a GPU")
    max_drafts = 0 if config.speculation.method == "off" else config.speculation.max_drafts
    windows, parts = loaded.kv_shape.windows, config.handoff_layer_parts if config.hands_over else 1
    bounds = config.max_num_seqs, max_num_batched_tokens, max_drafts, windows, parts
    limits = EngineLimits(max_model_len, block_size, _TRIAL_BLOCKS, *bounds)
    return replace(limits, num_blocks=_count_blocks(loaded, config, limits))


def _count_blocks(loaded: LoadedModel, config: EngineConfig, limits: EngineLimits) -> int:
    bytes_per_block = loaded.bytes_of_pool_block(limits.block_size)
    if config.num_blocks or config.kv_cache_bytes:
        return _wished_blocks(loaded, config, limits.block_size, bytes_per_block)
    if loaded.device.type == "cpu":
        return _count_cpu_blocks(limits, bytes_per_block)
    room = _gpu_pool_bytes(loaded, limits, bytes_per_block, config)
    return min(max(1, room // bytes_per_block), _MAX_SLOTS // limits.block_size)


def _wished_blocks(loaded: LoadedModel, config: EngineConfig, block_size: int, bytes_per_block: int) -> int:
    """What was said of the pool's size, if it can be met; on a GPU its memory says so when it is taken."""
    if config.num_blocks:
        wish, num_blocks = f"num_blocks is {config.num_blocks}", config.num_blocks
    else:
        assert config.kv_cache_bytes is not None
        wish, num_blocks = f"kv_cache_bytes is {config.kv_cache_bytes}", config.kv_cache_bytes // bytes_per_block
    if not num_blocks:
        raise LimitsError(f"{wish}, one block alone takes {bytes_per_block}")
    if loaded.device.type == "cpu":
        _check_memory(wish, num_blocks * bytes_per_block)
    if (num_tokens := num_blocks * block_size) > _MAX_SLOTS:
        raise LimitsError(f"{wish}: {num_tokens} tokens, in blocks of {block_size}, must be {_MAX_SLOTS} at most")
    return num_blocks


def _check_memory(wish: str, num_bytes: int) -> None:
    """Refuse a pool that cannot fit; warn of one that does not now, for another process may soon be over."""
    total, available = total_memory(), available_memory()
    found = (
        f"{wish}: the KV pool takes {num_bytes / _GIB:.2f} GiB, the machine or container has {total / _GIB:.2f} GiB of"
        f" memory, of which {available / _GIB:.2f} are available"
    )
    if num_bytes > total:
        raise LimitsError(found)
    if num_bytes > available:
        logger.warning("%s: the system may end processes for want of memory", found)


def _count_cpu_blocks(limits: EngineLimits, bytes_per_block: int) -> int:
    available = available_memory()
    num_blocks = max(1, min(_CPU_POOL_BYTES, int(available * _CPU_MEMORY_SHARE)) // bytes_per_block)
    _check_memory(f"block_size is {limits.block_size}", num_blocks * bytes_per_block)
    longest = Retention.of(limits).longest(num_blocks, limits.max_model_len)
    if longest < limits.max_model_len:
        logger.warning(
            "the KV pool holds %d tokens, fewer than max_model_len (%d): it takes a quarter of the %.2f GiB of memory"
            " that are available, %.2f GiB at most; free memory or set kv_cache_bytes",
            longest,
            limits.max_model_len,
            available / _GIB,
            _CPU_POOL_BYTES / _GIB,
        )
    return num_blocks


def _gpu_pool_bytes(loaded: LoadedModel, limits: EngineLimits, bytes_per_block: int, config: EngineConfig) -> int:
    free = free_beside_largest_steps(loaded, limits)
    handed_over = loaded.kv_shape.bytes_per_block(limits.block_size)
    exports = export_room(limits, handed_over, loaded.device, config.hands_over).num_bytes
    room = free + limits.num_blocks * bytes_per_block - exports - _MARGIN_BYTES
    found = (
        f"{free / _GIB:.2f} GiB of the GPU's memory are free beside the model and its largest steps; hand-offs take"
        f" {exports / _GIB:.2f} of them, {_MARGIN_BYTES / _GIB:.2f} stay free"
    )
    if room < bytes_per_block:
        raise LimitsError(f"{found}, and nothing is left for KV: lower {name_limits(limits)}")
    logger.info("%s, the KV pool gets %.2f", found, room / _GIB)
    return room
