"""One hand-off at the prefill engine: its chunks as they become complete, and those who are told of them.

`Outbox` calls it under its lock, but for `tell_all`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from threading import Lock
from typing import TYPE_CHECKING, TypeAlias

from deployments.engine.handoff.states import Side, State
from deployments.kv_groups import layers_of_parts
from deployments.messages import ChunkReady, DrawnToken

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A chunk that is complete, or some layers of one.

    Attributes:
        chunk: which blocks and layers; the first token comes with the last part of the last chunk.
        tensor: the memory of the whole chunk.
        num_parts: that the chunk has.
    """

    chunk: ChunkReady
    tensor: "Tensor"
    num_parts: int = 1

    @property
    def kv(self) -> "Tensor":
        """What of the memory it is."""
        return self.tensor if self.chunk.layers is None else self.tensor[slice(*self.chunk.layers)]


class End(StrEnum):
    """Nothing more is told of a hand-off."""

    WHOLE = "whole"  # for all was told
    GONE = "gone"  # it is over before


Word: TypeAlias = Part | End
# Called from any thread, by one at a time; must neither block nor raise.
Told: TypeAlias = Callable[[Word], object]


class Watcher:
    """Is told of one hand-off, in order, by whichever thread is there first; the others do not wait for it."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._words: deque[Word] = deque()
        self._telling = Lock()

    def add(self, words: list[Word]) -> None:
        """What it is to be told next."""
        self._words.extend(words)

    def tell(self) -> None:
        """Tell it of all that was added; returns at once if another thread does."""
        while self._words and self._telling.acquire(blocking=False):
            try:
                while self._words:
                    self._told(self._words.popleft())
            finally:
                self._telling.release()
            # What was added since: whoever did so may have left it to this thread.


@dataclass(slots=True)
class Chunk:
    """What was announced.

    Attributes:
        ready: what it is.
        tensor: its memory.
        cuts: layers at which it is cut into parts.
        num_copied: of the parts.
        num_complete: of the parts: the last one of all waits for the first token.
    """

    ready: ChunkReady
    tensor: "Tensor"
    cuts: tuple[int, ...]
    num_copied: int = 0
    num_complete: int = 0

    @property
    def num_parts(self) -> int:
        return len(self.cuts) + 1

    @property
    def is_complete(self) -> bool:
        return self.num_complete == self.num_parts

    def complete(self, first_token: DrawnToken | None) -> list[Word]:
        """What has become complete: all that is copied, but the last part of the last chunk waits for the token."""
        waits = self.ready.is_last and first_token is None
        before, self.num_complete = self.num_complete, min(self.num_copied, self.num_parts - waits)
        return [self._part(number, first_token) for number in range(before, self.num_complete)]

    def parts(self, first_token: DrawnToken | None) -> list[Word]:
        """All that is complete."""
        return [self._part(number, first_token) for number in range(self.num_complete)]

    def _part(self, number: int, first_token: DrawnToken | None) -> Part:
        layers = layers_of_parts(self.cuts, len(self.tensor))[number] if self.cuts else None
        token = first_token if self.ready.is_last and number == len(self.cuts) else None
        return Part(replace(self.ready, layers=layers, first_token=token), self.tensor, self.num_parts)


class Outgoing(Side):
    """One side of a hand-off, with what it holds."""

    def __init__(self, request_id: str, expires_s: float, first_block: int) -> None:
        super().__init__(expires_s)
        self.request_id = request_id
        self.next_block = first_block
        self.first_token: DrawnToken | None = None
        self.chunks: dict[int, Chunk] = {}
        self.is_taken = False
        self.is_dropped = False
        self.watchers: list[Watcher] = []

    @property
    def end(self) -> End | None:
        """What whoever is told of it is told last; None: more may come."""
        if self.is_dropped:
            return End.GONE
        is_announced = self.state not in (State.RESERVED, State.FILLING)
        return End.WHOLE if is_announced and all(chunk.is_complete for chunk in self.chunks.values()) else None

    def note(self, words: list[Word]) -> list[Watcher]:
        """Who is to be told of this now; under the lock, and told without it."""
        watchers = self.watchers
        if (end := self.end) is not None:
            words, self.watchers = [*words, end], []
        for watcher in watchers if words else ():
            watcher.add(words)
        return list(watchers)


def tell_all(watchers: list[Watcher]) -> None:
    """Of what was added to them."""
    for watcher in watchers:
        watcher.tell()
