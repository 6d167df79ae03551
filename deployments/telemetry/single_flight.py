"""One making at a time of what several want at once: whoever comes meanwhile gets what the first one gets."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """See the module. For one event loop."""

    def __init__(self) -> None:
        self._making: asyncio.Task[T] | None = None

    async def __call__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What is being made, or else what `make` makes; one who leaves does not take it from the others.

        Raises:
            Exception: what the making raised, to each of them.
        """
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(make())
            self._making.add_done_callback(_look)
        return await asyncio.shield(self._making)


def _look(making: "asyncio.Task[T]") -> None:
    """Where all have left, nobody else would look at what it raised."""
    if not making.cancelled():
        making.exception()
