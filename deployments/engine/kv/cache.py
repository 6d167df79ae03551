"""The KV pool of one engine: a single tensor, allocated once, and copies of blocks in and out of it."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV
from deployments.engine.kv.layers import layer_ends
from deployments.engine.kv.rounded import RoundedBlocks
from deployments.engine.upload import upload
from deployments.errors import UnsupportedModelError
from deployments.kv_groups import (
    FP8,
    KV_FORMS,
    KVForm,
    KVGroup,
    KVGroups,
    bytes_of_pool_block,
    bytes_per_block,
    bytes_per_token,
    first_group,
    windows_of,
)


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's KV is.

    Attributes:
        groups: of layers.
        dtype: of the numbers, as layers give and attention takes them.
        is_fp8: whether they are rounded to 8 bits when they are stored; else they are stored as they are.

    Raises:
        UnsupportedModelError: no pool keeps such KV, see `first_group`.
    """

    groups: KVGroups
    dtype: torch.dtype
    is_fp8: bool = False

    def __post_init__(self) -> None:
        head_dim = self.group.head_dim
        if self.is_fp8 and head_dim % FP8.scale_elements:
            raise UnsupportedModelError(
                f"kv_dtype is fp8, which needs heads of a multiple of {FP8.scale_elements} dimensions; these have"
                f" {head_dim}"
            )

    def stored_as(self, kv_dtype: Literal["auto", "fp8"]) -> "KVShape":
        """The same numbers as `EngineConfig.kv_dtype` wants them stored."""
        return replace(self, is_fp8=kv_dtype == "fp8")

    @property
    def form(self) -> KVForm:
        return FP8 if self.is_fp8 else KV_FORMS[str(self.dtype).removeprefix("torch.")]

    @property
    def group(self) -> KVGroup:
        """The first one, whose shape blocks have."""
        return first_group(self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return windows_of(self.groups)

    @property
    def keeping_all(self) -> "KVShape":
        """The same layers as one group that keeps all KV."""
        layers = tuple(sorted(layer for group in self.groups for layer in group.layers))
        return replace(self, groups=(replace(self.group, layers=layers, window=None),))

    @property
    def bytes_per_token(self) -> int:
        return bytes_per_token(self.groups, self.form)

    def bytes_per_block(self, block_size: int) -> int:
        """Of so many tokens in all layers."""
        return bytes_per_block(self.groups, block_size, self.form)

    def bytes_of_pool_block(self, block_size: int) -> int:
        """Of so many tokens in the layers of one group."""
        return bytes_of_pool_block(self.groups, block_size, self.form)


class KVCache:
    """Keys and values of all layers in blocks, each of which holds some tokens in the layers of one group.

    Attributes:
        group: the first one, whose shape blocks have.
        num_groups: that share the pool.
        group_of: by a layer's index in the model, its group.
        place_of: likewise, its place in that group's blocks.
        dtype: of the numbers, as layers give and attention takes them.
        is_fp8: whether they are rounded to 8 bits.
        blocks: (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim); [:, 0] are the keys. In FP8 as
            `KVGroup.chunk_shape` says.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.group, self.num_groups = shape.group, len(shape.groups)
        where = {layer: (g, i) for g, group in enumerate(shape.groups) for i, layer in enumerate(group.layers)}
        self.group_of = tuple(where[layer][0] for layer in range(len(where)))
        self.place_of = tuple(where[layer][1] for layer in range(len(where)))
        self.dtype, self.is_fp8, self._form = shape.dtype, shape.is_fp8, shape.form
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Zeroed, so that padded gathers never meet a NaN that a mask cannot silence; it also faults the pages in now,
        # when running out of memory is still a clear error at start-up.
        element = getattr(torch, self._form.element)
        self.blocks = torch.zeros(self.chunk_shape(num_blocks), dtype=element, device=device)
        self._slots = self.blocks.flatten(2, 3)
        self._rounded = RoundedBlocks(self.blocks, self.group.head_dim, self.dtype) if self.is_fp8 else None

    def part_ends(self, num_parts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Cut the places of a block into parts: where each ends, and behind how many leading layers it is written."""
        ends = layer_ends(self.group.num_layers, num_parts)
        layers = [1 + max(layer for layer, place in enumerate(self.place_of) if place < end) for end in ends]
        return ends, tuple(layers)

    def paged(self, layer: int) -> PagedKV:
        """Keys and values of one layer, as kernels take them."""
        place = self.place_of[layer]
        if self._rounded is not None:
            return self._rounded.paged(place)
        return PagedKV(*self.blocks[place])

    def write(self, layer: int, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens of one layer.

        Args:
            layer: index of the layer in the model.
            slot_mapping: (T,) int64 slots in blocks of its group.
            keys: (T, num_kv_heads, head_dim), also as a strided view.
            values: as the keys.

        Returns:
            Keys and values as they are read from now on: as they were given, or rounded.
        """
        place = self.place_of[layer]
        if self._rounded is not None:
            return self._rounded.write(place, slot_mapping, keys, values)
        self._slots[place, 0].index_copy_(0, slot_mapping, keys)
        self._slots[place, 1].index_copy_(0, slot_mapping, values)
        return keys, values

    def gather(self, layer: int, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copy blocks of one layer together: keys and values, each (N, block_size, num_kv_heads, head_dim)."""
        place = self.place_of[layer]
        if self._rounded is not None:
            return self._rounded.gather(place, block_ids)
        keys, values = self.blocks[place]
        return keys.index_select(0, block_ids), values.index_select(0, block_ids)

    def export_blocks(self, block_ids: list[int], out: Tensor, first_layer: int = 0) -> None:
        """Copy blocks out, of every layer or of some that follow each other.

        Args:
            block_ids: N of them.
            out: of `chunk_shape`, or of fewer layers; contiguous.
            first_layer: place in the blocks of the first one that is copied.
        """
        pool = self.blocks[first_layer : first_layer + len(out)]
        ids = upload(np.array(block_ids, np.int64), self.blocks.device)
        if self.blocks.is_cuda:
            from deployments.engine.kernels.cuda_blocks import gather_blocks  # Triton is there only where a GPU is

            gather_blocks(pool, ids, out)
        else:
            torch.index_select(pool, 2, ids, out=out)

    def import_blocks(self, block_ids: list[int], chunk: Tensor, layers: tuple[int, int] | None = None) -> None:
        """Copy a chunk, shaped as that of `export_blocks`, into blocks.

        Args:
            block_ids: N of them.
            chunk: what is copied; some blocks of a larger one as well.
            layers: the first one that it has, and the one behind the last; None: it has all.

        Raises:
            ValueError: the chunk has another shape or dtype.
        """
        pool = self.blocks if layers is None else self.blocks[layers[0] : layers[1]]
        expected = (len(pool), *self.chunk_shape(len(block_ids))[1:])
        if tuple(chunk.shape) != expected or chunk.dtype != self.blocks.dtype:
            raise ValueError(
                f"KV chunk is {tuple(chunk.shape)} {chunk.dtype}, this pool takes {expected} {self.blocks.dtype}"
            )
        ids = upload(np.array(block_ids, np.int64), self.blocks.device)
        if self.blocks.is_cuda:
            from deployments.engine.kernels.cuda_blocks import scatter_blocks

            scatter_blocks(pool, ids, chunk)
        else:
            pool.index_copy_(2, ids, chunk)

    def chunk_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of so many blocks."""
        return self.group.chunk_shape(num_blocks, self.block_size, self._form)
