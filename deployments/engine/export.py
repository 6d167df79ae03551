"""Chunks of KV that were copied out of the pool and wait to be taken. The one part of an engine that threads share."""

from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor


@dataclass(slots=True)
class _Exported:
    num_blocks: int
    tensor: Tensor | None
    ready: torch.cuda.Event | None


@dataclass(slots=True)
class ExportBuffer:
    """Holds chunks from the copy until the receiver has them; bounded in blocks.

    A chunk counts against the bound until `release`, also after `take`: until then its memory is in use.
    """

    max_blocks: int
    _chunks: dict[str, dict[int, _Exported]] = field(default_factory=dict)
    _num_blocks: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.max_blocks - self._num_blocks

    def has(self, request_id: str) -> bool:
        """Whether any chunk of the request still counts."""
        return request_id in self._chunks

    def put(self, request_id: str, index: int, num_blocks: int, tensor: Tensor, ready: torch.cuda.Event | None) -> None:
        """Keep a chunk that is complete when `ready` says so; None: it is."""
        with self._lock:
            self._chunks.setdefault(request_id, {})[index] = _Exported(num_blocks, tensor, ready)
            self._num_blocks += num_blocks

    def take(self, request_id: str, index: int) -> Tensor | None:
        """Give the chunk away, once, when it is complete; None if it was taken, released, or never there."""
        with self._lock:
            chunk = self._chunks.get(request_id, {}).get(index)
            if chunk is None:
                return None
            tensor, chunk.tensor = chunk.tensor, None
        if chunk.ready is not None:
            chunk.ready.synchronize()
        return tensor

    def release(self, request_id: str, index: int | None = None) -> None:
        """The receiver has the chunk, or nobody wants it any more; without an index: all of the request's."""
        with self._lock:
            chunks = self._chunks.get(request_id, {})
            for i in [index] if index is not None else list(chunks):
                chunk = chunks.pop(i, None)
                if chunk is not None:
                    self._num_blocks -= chunk.num_blocks
            if not chunks:
                self._chunks.pop(request_id, None)
