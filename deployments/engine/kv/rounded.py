"""Blocks whose numbers are rounded to FP8: where codes and scales lie in a block's bytes, and plain torch for them.

A block is one run of bytes for all who copy it: codes (block_size, H_kv, head_dim), then their scales
(H_kv, block_size) float32, so that those of one head lie behind each other as kernels read them.
"""

import torch
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV
from deployments.engine.kernels.fp8 import FP8
from deployments.engine.kernels.fp8_kv import round_heads, widen_heads
from deployments.engine.kv.slots import places


class RoundedBlocks:
    """Views of a pool.

    Args:
        blocks: (num_layers, 2, num_blocks, block_size, H_kv, head_dim + 4) uint8, contiguous.
        head_dim: a multiple of 4.
        dtype: of the numbers outside.
    """

    def __init__(self, blocks: Tensor, head_dim: int, dtype: torch.dtype) -> None:
        self._block_size, num_kv_heads = blocks.shape[3:5]
        num_codes = self._block_size * num_kv_heads * head_dim
        flat = blocks.flatten(3)
        self._codes = flat[..., :num_codes].unflatten(-1, (self._block_size, num_kv_heads, head_dim))
        scales = flat.view(torch.float32)[..., num_codes // 4 :]
        self._scales = scales.unflatten(-1, (num_kv_heads, self._block_size))
        self._dtype = dtype

    def paged(self, layer: int) -> PagedKV:
        """See `KVCache.paged`."""
        return PagedKV(*self._codes[layer].view(FP8), *self._scales[layer])

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache.write`."""
        return self._write(layer, 0, slots, keys), self._write(layer, 1, slots, values)

    def _write(self, layer: int, part: int, slots: Tensor, numbers: Tensor) -> Tensor:
        codes, scales = round_heads(numbers)
        blocks, tokens = places(slots, self._block_size)
        self._codes[layer, part][blocks, tokens] = codes.view(torch.uint8)
        self._scales[layer, part][blocks, :, tokens] = scales
        return widen_heads(codes, scales, self._dtype)

    def gather(self, layer: int, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache.gather`."""
        return self._gather(layer, 0, block_ids), self._gather(layer, 1, block_ids)

    def _gather(self, layer: int, part: int, block_ids: Tensor) -> Tensor:
        if block_ids.is_cuda:
            from deployments.engine.kernels.cuda_fp8_kv import widen_blocks  # Triton is there only where a GPU is

            codes = self._codes[layer, part].view(FP8)
            return widen_blocks(codes, self._scales[layer, part], block_ids, self._dtype)
        codes = self._codes[layer, part].index_select(0, block_ids).view(FP8)
        scales = self._scales[layer, part].index_select(0, block_ids)
        return widen_heads(codes, scales.transpose(1, 2), self._dtype)
