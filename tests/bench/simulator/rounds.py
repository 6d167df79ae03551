"""Rounds of load on a service that has the machine for itself: those that others have disturbed are played again."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from app.local_process import RunFolder
from load_tests.samples import Run
from tests.bench.cpu_use import CpuUse
from tests.bench.simulator.teacher import Watch

# Of all cores, what others may use: in the mean of a round, and in any few seconds of it. On a quiet machine Ray's own
# daemons and the system use 0.05 cores of 2 (AMD EPYC, 2026-11-29), and 0.16 to 0.22 of 16 (Intel Xeon, 2026-11-30).
MAX_OTHERS_SHARE, MAX_OTHERS_PEAK_SHARE = 0.075, 0.25
_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class Use:
    """Cores that were used in a round.

    Attributes:
        mean: by role, all else on the machine as `others`.
        peak: of all else, over the worst few seconds.
        num_cores: that there are.
    """

    mean: dict[str, float]
    peak: float
    num_cores: int

    @property
    def problems(self) -> list[str]:
        """Why the round says nothing of the service; none: it had the machine for itself."""
        others, most = self.mean["others"], MAX_OTHERS_SHARE * self.num_cores
        if others > most:
            return [f"others used {others:.2f} cores, more than {most:.2f}"]
        if self.peak > (most := MAX_OTHERS_PEAK_SHARE * self.num_cores):
            return [f"others used {self.peak:.2f} cores for {_WINDOW_S:.0f} s, more than {most:.2f}"]
        return []


class UseWatch:
    """Watches who uses the cores, every few seconds.

    Args:
        folder: of the server.
        read: of the server in a folder; exchanged by tests.
        clock: monotonic seconds.
        num_cores: of the machine.
    """

    def __init__(
        self,
        folder: RunFolder,
        read: Callable[[RunFolder], CpuUse] = CpuUse.read,
        clock: Callable[[], float] = time.monotonic,
        num_cores: int = os.cpu_count() or 1,
    ) -> None:
        self._folder = folder
        self._read = read
        self._clock = clock
        self._num_cores = num_cores
        self._seen: list[tuple[float, CpuUse]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look now, every few seconds, and at the end."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_WINDOW_S):
                self.look()

        self._seen.clear()
        self.look()
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.look()

    def look(self) -> None:
        """Note what was used so far."""
        self._seen.append((self._clock(), self._read(self._folder)))

    @property
    def use(self) -> Use:
        """Since the watch began."""
        pairs = list(zip(self._seen, self._seen[1:], strict=False))
        # What is left behind the last whole window is too short to judge.
        windows = [pair for pair in pairs if pair[1][0] - pair[0][0] >= _WINDOW_S / 2] or pairs
        peak = max(now.cores_since(before, at - then)["others"] for (then, before), (at, now) in windows)
        (begun_s, first), (ended_s, last) = self._seen[0], self._seen[-1]
        return Use(last.cores_since(first, ended_s - begun_s), peak, self._num_cores)


@dataclass(frozen=True, slots=True)
class Round:
    """One that was played.

    Attributes:
        run: what clients saw.
        use: of the cores.
        watch: what the service told of itself meanwhile.
    """

    run: Run
    use: Use
    watch: Watch

    @property
    def problems(self) -> list[str]:
        """Why it is no measurement."""
        failed = sum(sample.error is not None for sample in self.run.samples)
        return [*self.run.generator.problems, *([f"{failed} requests failed"] if failed else []), *self.use.problems]


@dataclass(slots=True)
class Rounds:
    """Those of one deployment.

    Attributes:
        wanted: rounds without a problem.
        allowed: that are played for them.
        clean: without a problem.
        spoilt: the others.
    """

    wanted: int
    allowed: int
    clean: list[Round] = field(default_factory=list)
    spoilt: list[Round] = field(default_factory=list)

    def play(self, one: Callable[[int], Round], say: Callable[[str], None]) -> None:
        """Play until there are as many as wanted, or as allowed.

        Args:
            one: plays the round of that number; each has its own requests.
            say: told of each.
        """
        for number in range(self.allowed):
            played = one(number)
            (self.spoilt if played.problems else self.clean).append(played)
            others = f"others used {played.use.mean['others']:.2f} cores, at most {played.use.peak:.2f}"
            verdict = "; ".join(played.problems) or "counts"
            say(f"round {number}: {len(played.run.samples)} requests; {others}; {verdict}")
            if len(self.clean) == self.wanted:
                return

    @property
    def problems(self) -> list[str]:
        """Why they are no measurement."""
        if len(self.clean) >= self.wanted:
            return []
        return [f"{len(self.clean)} of {self.allowed} rounds had the machine for themselves, {self.wanted} are needed"]
