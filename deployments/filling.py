"""A hand-off's way into a decode engine's pool: its parts come from any thread, and are taken in between two steps.

Knows no Ray. Called by whoever receives KV: an engine's actor, or an engine in its front's process.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.handoff.completions import Completions
from deployments.engine.loop import EngineLoop
from deployments.messages import ChunkReady
from deployments.receipts import ChunkArrived

# A part that is imported waits for the step in progress; a step longer than this means that the engine hangs.
_IMPORT_TIMEOUT_S = 60.0


class _Part(NamedTuple):
    """Some layers of a chunk, or all; `num_parts` of it that lie behind each other in memory."""

    chunk: ChunkReady
    tensor: Tensor
    complete_s: float
    num_parts: int = 1


class _Coming:
    """A chunk of which something has come."""

    def __init__(self, num_parts: int) -> None:
        self.num_left = num_parts
        self.num_bytes = 0
        self.seconds = self.until_s = 0.0
        # Kept until the device has read all of the chunk.
        self.kept: list[Tensor] = []
        # Blocks, bytes, seconds, and when that was.
        self.arrived: Future[tuple[int, int, float, float]] = Future()


class Filling:
    """A hand-off's way into the pool: each part between two steps, with all that are there by then.

    Left by an exception, it takes nothing more: the parts may lie in memory that the source gives to others then.

    Args:
        loop: of the engine.
        import_chunk: called in the loop's thread, see `EngineHost.import_chunk`.
        imports: who tells when the device has read what was imported; called in the loop's thread.
        release: told of each chunk that is in the pool and is read no more, by its number; from any thread.
    """

    def __init__(
        self,
        loop: EngineLoop,
        import_chunk: "Callable[[ChunkReady, Tensor, Engine], torch.cuda.Event | None]",
        imports: Completions,
        release: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._import_chunk = import_chunk
        self._imports = imports
        self._release = release
        self._parts: deque[_Part] = deque()
        self._chunks: dict[int, _Coming] = {}
        self._commands: deque[Future[None]] = deque()
        self._last_import: torch.cuda.Event | None = None

    def add(
        self, chunk: ChunkReady, tensor: Tensor, complete_s: float, *, num_parts: int = 1, keeps: bool = True
    ) -> None:
        """Take a part.

        Args:
            chunk: what it is.
            tensor: its KV.
            complete_s: when it was, monotonic.
            num_parts: that the chunk has; each comes once.
            keeps: it is kept until the device has read all of the chunk. A part that was sent is not: the memory is
                owed to parts of other chunks, without which this chunk's next part may not come (`KVCopies.import_`).

        Raises:
            ValueError: an earlier one was refused, see `Engine.import_chunk`.
        """
        while self._commands and self._commands[0].done():
            self._commands.popleft().result()
        coming = self._chunks.setdefault(chunk.index, _Coming(num_parts))
        coming.num_bytes += tensor.nbytes
        if keeps:
            coming.kept.append(tensor)
        self._parts.append(_Part(chunk, tensor, complete_s))
        self._commands.append(self._loop.submit(self._take_in))

    def finish(self) -> list[ChunkArrived]:
        """Wait until the device has read all; what came.

        Raises:
            ValueError: see `Engine.import_chunk`.
        """
        for command in self._commands:
            command.result(_IMPORT_TIMEOUT_S)
        found = [coming.arrived.result(_IMPORT_TIMEOUT_S) for coming in self._chunks.values()]
        now_s = time.monotonic()
        return [ChunkArrived(blocks, nbytes, seconds, now_s - at_s) for blocks, nbytes, seconds, at_s in found]

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            return
        for command in [command for command in self._commands if not command.cancel()]:
            with suppress(Exception):
                command.result(_IMPORT_TIMEOUT_S)
        if self._last_import is not None:
            self._last_import.synchronize()

    def _take_in(self, engine: Engine) -> None:
        for part in _joined(self._parts):
            imported = self._last_import = self._import_chunk(part.chunk, part.tensor, engine)
            coming, now_s = self._chunks[part.chunk.index], time.monotonic()
            coming.seconds += now_s - max(part.complete_s, coming.until_s)
            coming.until_s = now_s
            coming.num_left -= part.num_parts
            if not coming.num_left:
                self._imports.call_after(imported, partial(self._note_arrival, part.chunk, coming))

    def _note_arrival(self, chunk: ChunkReady, coming: _Coming) -> None:
        now_s = time.monotonic()
        coming.kept.clear()
        self._release(chunk.index)
        coming.arrived.set_result((chunk.num_blocks, coming.num_bytes, coming.seconds + now_s - coming.until_s, now_s))


def _joined(parts: deque[_Part]) -> Iterator[_Part]:
    """Take all that are there, those as one that lie behind each other in memory: each import costs a launch."""
    while parts:
        part = parts.popleft()
        while parts and part.chunk.layers and _follows(parts[0], part):
            first, after = part, parts.popleft()
            assert first.chunk.layers is not None and after.chunk.layers is not None
            layers = first.chunk.layers[0], after.chunk.layers[1]
            shape = (layers[1] - layers[0], *first.tensor.shape[1:])
            part = _Part(
                replace(after.chunk, layers=layers),
                first.tensor.as_strided(shape, first.tensor.stride()),
                first.complete_s,
                first.num_parts + after.num_parts,
            )
        yield part


def _follows(part: _Part, before: _Part) -> bool:
    tensor, other = part.tensor, before.tensor
    return (
        part.chunk.index == before.chunk.index
        and tensor.data_ptr() == other.data_ptr() + other.nbytes
        and tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )
