"""What of the engine's loop those need who copy beside it."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from deployments.engine.engine import Engine

T = TypeVar("T")


class Loop(Protocol):
    """Where an engine's steps run."""

    def call(self, command: Callable[[Engine], T], timeout_s: float | None = None) -> T:
        """Have something done between two steps, and wait for it; `EngineDeadError` if there are no more steps."""
        ...

    def submit(self, command: Callable[[Engine], T]) -> "Future[T]":
        """`call`, without waiting."""
        ...
