"""Chunks of KV out of the pool and into it: in order with the steps that compute and read it, on a GPU beside them."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from deployments.engine.kv.cache import KVCache

# (shape, dtype) to a contiguous tensor for a chunk, or None where there is no room.
Allocate: TypeAlias = Callable[[tuple[int, ...], torch.dtype], Tensor | None]


class KVCopies:
    """Copies between one pool and chunks. For the thread that launches the steps.

    On a GPU chunks are copied on streams of their own. Out: a chunk is ready as soon as its KV is computed, and not
    only behind the step that was launched meanwhile. In: beside the step that runs, which reads none of it; only the
    next one waits, for what is left by then. Events say when: None stands for at once.

    Args:
        cache: the pool.

    Attributes:
        import_stream: on which chunks are copied in; None: not on a GPU.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._allocate: Allocate | None = None
        self._stream = torch.cuda.Stream(cache.blocks.device) if cache.blocks.is_cuda else None
        self.import_stream = torch.cuda.Stream(cache.blocks.device) if cache.blocks.is_cuda else None
        if self._stream is not None:
            self._compile()

    @property
    def num_layers(self) -> int:
        """Of a block."""
        return self._cache.group.num_layers

    def part_ends(self, num_parts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `KVCache.part_ends`."""
        return self._cache.part_ends(num_parts)

    def allocate_from(self, allocate: Allocate) -> None:
        """Copy chunks out to memory from there; where it has no room, as before to torch's."""
        self._allocate = allocate

    def allocate(self, num_blocks: int) -> Tensor:
        """Memory for a chunk of N blocks: (num_layers, 2, N, block_size, num_kv_heads, head_dim), uninitialized."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return self._place(self._cache.chunk_shape(num_blocks))

    def export(
        self, block_ids: list[int], chunk: Tensor, after: torch.cuda.Event | None, first_layer: int = 0
    ) -> torch.cuda.Event | None:
        """Copy blocks out. A later step may overwrite them only behind `hold_back`.

        Args:
            block_ids: N of them.
            chunk: from `allocate`, or some layers of it.
            after: when they are computed; None: they are.
            first_layer: of those that are copied.

        Returns:
            When the chunk is complete, and all that were copied before.
        """
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            self._cache.export_blocks(block_ids, chunk, first_layer)
            return self._stream.record_event() if self._stream is not None else None

    def hold_back(self, copied: torch.cuda.Event | None) -> None:
        """Have whatever is launched from now on wait for what was copied until then; None: it waits for nothing."""
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)

    def import_(
        self,
        parts: Iterable[tuple[list[int], Tensor]],
        layers: tuple[int, int] | None = None,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Copy a chunk, complete on a GPU too, into blocks, before any step that is launched later.

        Args:
            parts: ids of blocks, and what goes there; see `KVCache.import_blocks`. All of it lives until the copy is
                done, by itself if it has some layers alone.
            layers: likewise.
            after: when nobody reads or writes these blocks any more, see `fence`; None: nobody does.

        Raises:
            ValueError: the chunk has another shape or dtype.
        """
        with nullcontext() if self.import_stream is None else torch.cuda.stream(self.import_stream):
            if self.import_stream is not None and after is not None:
                self.import_stream.wait_event(after)
            for block_ids, part in parts:
                self._cache.import_blocks(block_ids, part, layers)
                if self.import_stream is not None and layers is not None:
                    part.record_stream(self.import_stream)
        self.hold_back(self.imported())

    def imported(self) -> torch.cuda.Event | None:
        """When all that was to be copied in up to now is."""
        return self.import_stream.record_event() if self.import_stream is not None else None

    def fence(self) -> torch.cuda.Event | None:
        """When everything that was launched up to now is done."""
        return torch.cuda.current_stream().record_event() if self._stream is not None else None

    def _compile(self) -> None:
        """Copy a block out and in, so that the first hand-off finds the kernels ready."""
        chunk = self.allocate(1)
        self.hold_back(self.export([0], chunk, None))
        self.import_([([0], chunk)], after=self.fence())
        torch.cuda.synchronize()

    def _place(self, shape: tuple[int, ...]) -> Tensor:
        blocks = self._cache.blocks
        chunk = self._allocate(shape, blocks.dtype) if self._allocate is not None else None
        return chunk if chunk is not None else torch.empty(shape, dtype=blocks.dtype, device=blocks.device)
