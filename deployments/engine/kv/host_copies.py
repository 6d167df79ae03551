"""Blocks of KV to and from the host's memory, copied beside the steps, on threads other than the one that takes them.

The blocks must be held for whoever copies, so that no step touches them meanwhile. On a GPU each copy has a stream of
its own and passes through pinned memory, unless what it comes from is pinned; steps never wait for one. In the host's
memory a block is one run of bytes: all its layers, keys and values, one behind the other.
"""

import ctypes
import queue
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.pinned import PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

# Copies at once on a GPU, each with a thread that moves bytes within the host: one thread brings 4.7 GB/s of shared
# memory to the device, four bring 17 (blocks of Llama-3.1-8B, one GPU, 16 cores, 2026-11-28).
_NUM_LANES = 8


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
        self.num_lanes = _NUM_LANES if self._pool.is_cuda else 1
        self._has_lanes = False
        self._lock = Lock()
        self.pinned = PinnedMemory() if self._pool.is_cuda else None

    def copy_out(self, block_ids: Sequence[int], computed: torch.cuda.Event | None, out: np.ndarray) -> float:
        """Copy blocks to the host's memory; returns when they are there.

        Args:
            block_ids: N of them.
            computed: when they are; None: they are.
            out: (N, bytes_per_block) uint8, contiguous; or some blocks behind each other in each row.

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
            with self._lane(computed) as lane:
                for block, row in zip(block_ids, rows, strict=True):
                    lane.fetch(self._pool[:, :, block], row)
            return
        pool = self._pool.numpy()
        for block, row in zip(block_ids, rows, strict=True):
            np.copyto(row, pool[:, :, block])

    def copy_in(self, block_ids: Sequence[int], computed: torch.cuda.Event | None, data: np.ndarray) -> None:
        """Copy what `copy_out` has made into blocks; returns when it is there, on a GPU too.

        Args:
            block_ids: N of them.
            computed: when no step that was launched before uses the blocks any more; None: none does.
            data: as `out`; it is not written to.
        """
        rows = self._rows(data, block_ids)
        if self.pinned is not None:
            with self._lane(computed) as lane:
                for block, row in zip(block_ids, rows, strict=True):
                    lane.put(row, self.pinned.cut(row.ctypes.data, row.nbytes), self._pool[:, :, block])
            return
        pool = self._pool.numpy()
        for block, row in zip(block_ids, rows, strict=True):
            np.copyto(pool[:, :, block], row)

    def _rows(self, data: np.ndarray, block_ids: Sequence[int]) -> np.ndarray:
        expected = (len(block_ids), self.bytes_per_block)
        if data.size != prod(expected) or data.dtype != np.uint8:
            raise ValueError(f"KV is {data.shape} {data.dtype}, these blocks take {expected} uint8")
        return data.reshape(-1, *self._plane_shape)

    @contextmanager
    def _lane(self, after: torch.cuda.Event | None) -> "Iterator[_Lane]":
        """A lane that nobody else uses; when it is given back its copies are done."""
        with self._lock:
            if not self._has_lanes:  # taken with the first copy: most engines make none
                self._has_lanes = True
                for _ in range(self.num_lanes):
                    self._lanes.put(_Lane.on(self._pool[:, :, 0]))
        lane = self._lanes.get()
        try:
            with torch.cuda.device(self._pool.device), torch.cuda.stream(lane.stream):
                if after is not None:
                    lane.stream.wait_event(after)
                try:
                    yield lane
                finally:
                    lane.stream.synchronize()  # whatever has failed: its blocks are given back
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

    def fetch(self, planes: Tensor, row: np.ndarray) -> None:
        """Copy a block to the host."""
        _words(self.staging).copy_(_words(planes))
        self.pinned.copy_(self.staging, non_blocking=True)
        self.stream.synchronize()
        np.copyto(row, self.pinned.numpy())

    def put(self, row: np.ndarray, sizes: Sequence[int] | None, planes: Tensor) -> None:
        """Copy a block to the device.

        Args:
            row: the block; where it is pinned, it is read until the stream has done this.
            sizes: bytes of its parts, each of which one transfer can read; None: it is not pinned.
            planes: of the block on the device.
        """
        if sizes is None:
            self.stream.synchronize()  # the one before is out of the pinned memory
            np.copyto(self.pinned.numpy(), row)
            self.staging.copy_(self.pinned, non_blocking=True)
        else:
            for part, place in zip(_in_place(row).split(sizes), self.staging.view(-1).split(sizes), strict=True):
                place.copy_(part, non_blocking=True)
        _words(planes).copy_(_words(self.staging))


def _in_place(row: np.ndarray) -> Tensor:
    """The bytes of a row, contiguous and perhaps not to be written to, without a copy."""
    return torch.frombuffer((ctypes.c_ubyte * row.nbytes).from_address(row.ctypes.data), dtype=torch.uint8)


def _words(planes: Tensor) -> Tensor:
    """As the widest numbers that fit: a kernel copies one number per thread."""
    fits = planes.shape[-1] % 8 == 0 and planes.storage_offset() % 8 == 0
    return planes.view(torch.int64) if fits else planes
