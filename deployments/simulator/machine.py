"""Engines that share cores: each is slower while others compute. Knows of engines only that their pace can change."""

from typing import Protocol


class Shares(Protocol):
    """An engine that shares a machine."""

    def change_pace(self, times: float) -> None:
        """What runs takes so many times as long from now on."""
        ...


class Machine:
    """One machine, and the engines that compute on it now.

    Args:
        slowdown: times that a step takes as long while one other engine computes; each further one adds as much.
    """

    def __init__(self, slowdown: float) -> None:
        self._slowdown = slowdown
        self._computing: list[Shares] = []

    def begins(self, engine: Shares) -> float:
        """An engine computes; how many times as long as alone it takes for that. Others take longer from now on."""
        if engine not in self._computing:
            self._tell(len(self._computing), len(self._computing) + 1)
            self._computing.append(engine)
        return self._slower(len(self._computing))

    def ends(self, engine: Shares) -> None:
        """It computes no more."""
        if engine in self._computing:
            self._computing.remove(engine)
            self._tell(len(self._computing) + 1, len(self._computing))

    def _tell(self, before: int, now: int) -> None:
        for other in self._computing:
            other.change_pace(self._slower(now) / self._slower(before))

    def _slower(self, num_computing: int) -> float:
        return 1.0 + (self._slowdown - 1.0) * (num_computing - 1)
