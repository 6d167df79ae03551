"""Blocks of KV to and from the host's memory, copied beside the steps, on threads other than the one that takes them.

The blocks must be held for whoever copies, so that no step touches them meanwhile. On a GPU each copy has a stream of
its own and passes through pinned memory; steps never wait for one. In the host's memory a block is one run of bytes:
all layers, keys and values, one behind the other.
"""

import queue
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deployments.engine.kv.cache import KVCache

if TYPE_CHECKING:
    from collections.abc import Iterator

# Copies at once on a GPU, each with a thread that moves bytes within the host: one thread brings 4.7 GB/s of shared
# memory to the device, four bring 17 (blocks of Llama-3.1-8B, one GPU, 16 cores, 2026-11-28).
_NUM_THREADS = 8
# Blocks of pinned memory that they share: while the device still reads a block, its thread fills another one.
_NUM_LANES = 12


class HostCopies:
    """Copies of one pool's blocks. Safe from any thread.

    Args:
        cache: the pool.
    """

    def __init__(self, cache: KVCache) -> None:
        self._pool = cache.blocks.flatten(3).view(torch.uint8)  # (num_layers, 2, num_blocks, bytes of a plane)
        planes = self._pool[:, :, 0]
        self.bytes_per_block = planes.numel()
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._plane_shape = tuple(planes.shape)
        self.num_threads = _NUM_THREADS if self._pool.is_cuda else 1
        self._has_lanes = False
        self._lock = Lock()

    def copy_out(self, block_ids: Sequence[int], computed: torch.cuda.Event | None, out: np.ndarray) -> float:
        """Copy blocks to the host's memory; returns when they are there.

        Args:
            block_ids: N of them.
            computed: when they are; None: they are.
            out: (N, bytes_per_block) uint8.

        Returns:
            Seconds that this took others: on a GPU all of them, on a CPU those of a core. A copy that waits for a core,
            or for the interpreter, is in nobody's way.
        """
        clock = time.monotonic if self._pool.is_cuda else time.thread_time
        begun_s = clock()
        self._copy_out(block_ids, computed, self._rows(out, block_ids))
        return clock() - begun_s

    def _copy_out(self, block_ids: Sequence[int], computed: torch.cuda.Event | None, rows: np.ndarray) -> None:
        if self._pool.is_cuda:
            with self._lane() as lane:
                for block, row in zip(block_ids, rows, strict=True):
                    lane.fetch(self._pool[:, :, block], row, computed)
            return
        pool = self._pool.numpy()
        for block, row in zip(block_ids, rows, strict=True):
            np.copyto(row, pool[:, :, block])

    def copy_in(
        self, block_ids: Sequence[int], computed: torch.cuda.Event | None, data: np.ndarray
    ) -> torch.cuda.Event | None:
        """Copy what `copy_out` has made into blocks; returns when the data was read.

        Args:
            block_ids: N of them.
            computed: when no step that was launched before uses the blocks any more; None: none does.
            data: (N, bytes_per_block) uint8; it is not written to.

        Returns:
            When it is in the blocks; None: it is.
        """
        rows = self._rows(data, block_ids)
        if self._pool.is_cuda:
            with self._lane() as lane:
                for block, row in zip(block_ids, rows, strict=True):
                    lane.put(row, self._pool[:, :, block], computed)
                return lane.written()
        pool = self._pool.numpy()
        for block, row in zip(block_ids, rows, strict=True):
            np.copyto(pool[:, :, block], row)
        return None

    def _rows(self, data: np.ndarray, block_ids: Sequence[int]) -> np.ndarray:
        expected = (len(block_ids), self.bytes_per_block)
        if data.shape != expected or data.dtype != np.uint8:
            raise ValueError(f"KV is {data.shape} {data.dtype}, these blocks take {expected} uint8")
        return data.reshape(-1, *self._plane_shape)

    @contextmanager
    def _lane(self) -> "Iterator[_Lane]":
        """A lane that nobody else uses. It is given back while the device still copies; the next one's copies wait."""
        with self._lock:
            if not self._has_lanes:  # taken with the first copy: most engines make none
                self._has_lanes = True
                for _ in range(_NUM_LANES):
                    self._lanes.put(_Lane.on(self._pool[:, :, 0]))
        lane = self._lanes.get()
        try:
            with torch.cuda.device(self._pool.device), torch.cuda.stream(lane.stream):
                yield lane
        finally:
            self._lanes.put(lane)


@dataclass(frozen=True, slots=True)
class _Lane:
    """A stream and the memory of a block on either side.

    The device's is there so that one transfer carries a whole block: in the pool its planes lie apart.
    """

    stream: torch.cuda.Stream
    pinned: Tensor
    staging: Tensor

    @classmethod
    def on(cls, planes: Tensor) -> "_Lane":
        """For blocks of these planes, strided as in the pool."""
        pinned = torch.empty(planes.shape, dtype=torch.uint8, pin_memory=True)
        return cls(torch.cuda.Stream(planes.device), pinned, torch.empty_like(pinned, device=planes.device))

    def fetch(self, planes: Tensor, row: np.ndarray, after: torch.cuda.Event | None) -> None:
        """Copy a block to the host."""
        if after is not None:
            self.stream.wait_event(after)
        _words(self.staging).copy_(_words(planes))
        self.pinned.copy_(self.staging, non_blocking=True)
        self.stream.synchronize()
        np.copyto(row, self.pinned.numpy())

    def put(self, row: np.ndarray, planes: Tensor, after: torch.cuda.Event | None) -> None:
        """Have a block copied to the device; steps that run there delay the device alone."""
        self.stream.synchronize()  # the one before is out of the pinned memory
        np.copyto(self.pinned.numpy(), row)
        if after is not None:
            self.stream.wait_event(after)
        self.staging.copy_(self.pinned, non_blocking=True)
        _words(planes).copy_(_words(self.staging))

    def written(self) -> torch.cuda.Event:
        """When the device has done all that it was asked for here."""
        event: torch.cuda.Event = self.stream.record_event()
        return event


def _words(planes: Tensor) -> Tensor:
    """As the widest numbers that fit: a kernel copies one number per thread."""
    fits = planes.shape[-1] % 8 == 0 and planes.storage_offset() % 8 == 0
    return planes.view(torch.int64) if fits else planes
