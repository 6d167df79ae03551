"""The KV pool of one engine: a single tensor, allocated once, and copies of blocks in and out of it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.upload import upload


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's KV is, the same in every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers in blocks.

    Attributes:
        blocks: (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim); [:, 0] are the keys.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.shape = shape
        self.block_size = block_size
        # Zeroed, so that padded gathers never meet a NaN that a mask cannot silence; it also faults the pages in now,
        # when running out of memory is still a clear error at start-up.
        self.blocks = torch.zeros(
            (shape.num_layers, 2, num_blocks, block_size, shape.num_kv_heads, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        self._slots = self.blocks.view(shape.num_layers, 2, num_blocks * block_size, shape.num_kv_heads, shape.head_dim)

    def write(self, layer: int, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new tokens of one layer.

        Args:
            layer: index of the layer.
            slot_mapping: (T,) int64 slots.
            keys: (T, num_kv_heads, head_dim), also as a strided view.
            values: as the keys.
        """
        self._slots[layer, 0].index_copy_(0, slot_mapping, keys)
        self._slots[layer, 1].index_copy_(0, slot_mapping, values)

    def gather(self, layer: int, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copy blocks of one layer together: keys and values, each (N, block_size, num_kv_heads, head_dim)."""
        keys, values = self.blocks[layer]
        return keys.index_select(0, block_ids), values.index_select(0, block_ids)

    def export_blocks(self, block_ids: list[int], out: Tensor) -> None:
        """Copy blocks of every layer out.

        Args:
            block_ids: N of them.
            out: (num_layers, 2, N, block_size, num_kv_heads, head_dim), contiguous.
        """
        ids = upload(np.array(block_ids, np.int64), self.blocks.device)
        if self.blocks.is_cuda:
            from deployments.engine.kernels.cuda_blocks import gather_blocks  # Triton is there only where a GPU is

            gather_blocks(self.blocks, ids, out)
        else:
            torch.index_select(self.blocks, 2, ids, out=out)

    def import_blocks(self, block_ids: list[int], chunk: Tensor) -> None:
        """Copy a chunk, shaped as that of `export_blocks`, into blocks.

        Raises:
            ValueError: the chunk has another shape or dtype.
        """
        expected = self.chunk_shape(len(block_ids))
        if tuple(chunk.shape) != expected or chunk.dtype != self.blocks.dtype:
            raise ValueError(
                f"KV chunk is {tuple(chunk.shape)} {chunk.dtype}, this pool takes {expected} {self.blocks.dtype}"
            )
        ids = upload(np.array(block_ids, np.int64), self.blocks.device)
        if self.blocks.is_cuda:
            from deployments.engine.kernels.cuda_blocks import scatter_blocks

            scatter_blocks(self.blocks, ids, chunk)
        else:
            self.blocks.index_copy_(2, ids, chunk)

    def chunk_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of so many blocks of every layer."""
        return (*self.blocks.shape[:2], num_blocks, *self.blocks.shape[3:])
