"""Whether a service gathers anything while it serves: memory by its slope, all else by counts. Pure."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.bench.soak.processes import Usage

# Neighboring samples resemble each other; means of so many stretches of time hardly do, so their spread tells the error
# of the slope.
NUM_STRETCHES = 20
# Student's t, 97.5%, for a line through as many points.
_T = 2.101
# Thread pools of gRPC and asyncio make another thread now and then, as they are used. What is lost with each
# request, hand-off or client that left is lost dozens of times.
SPARE_THREADS = 8
SPARE_FDS = 8
_MIB = 2**20
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Trend:
    """A line through a process's memory.

    Attributes:
        mib_per_hour: its slope.
        error: standard error of that.
        first_mib: mean of the first stretch of time.
        last_mib: mean of the last.
    """

    mib_per_hour: float
    error: float
    first_mib: float
    last_mib: float

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95%."""
        return self.mib_per_hour - _T * self.error, self.mib_per_hour + _T * self.error

    def is_flat(self, max_mib_per_hour: float) -> bool:
        """Whether it may well not rise at all, or surely by less than the bound."""
        low, high = self.interval
        return low <= 0 or high < max_mib_per_hour


def fit_trend(times_s: Sequence[float], num_bytes: Sequence[float]) -> Trend:
    """Fit a line by least squares to the means of `NUM_STRETCHES` stretches of equally many samples.

    Raises:
        ValueError: there are fewer samples than stretches.
    """
    if len(num_bytes) < NUM_STRETCHES:
        raise ValueError(f"{len(num_bytes)} samples; a trend takes at least {NUM_STRETCHES}")
    x = np.array([part.mean() for part in np.array_split(np.asarray(times_s), NUM_STRETCHES)]) / _HOUR_S
    y = np.array([part.mean() for part in np.array_split(np.asarray(num_bytes), NUM_STRETCHES)]) / _MIB
    centered = x - x.mean()
    spread = float((centered**2).sum())
    slope = float((centered * y).sum()) / spread
    rest = y - y.mean() - slope * centered
    error = math.sqrt(float((rest**2).sum()) / (NUM_STRETCHES - 2) / spread)
    return Trend(slope, error, float(y[0]), float(y[-1]))


def by_process(samples: Sequence[Usage]) -> dict[str, list[Usage]]:
    """Samples of each process, under its role and pid."""
    found = defaultdict(list)
    for usage in samples:
        found[f"{usage.role} {usage.pid}"].append(usage)
    return dict(found)


def fit_trends(samples: Sequence[Usage], read: Callable[[Usage], int]) -> dict[str, Trend]:
    """Trends of the processes that lived throughout.

    Args:
        samples: of all processes.
        read: which memory of them.
    """
    processes = by_process(samples)
    longest = max(map(len, processes.values()), default=0)
    return {
        name: fit_trend([one.at_s for one in own], [read(one) for one in own])
        for name, own in processes.items()
        if len(own) == longest
    }


@dataclass(frozen=True, slots=True)
class Idle:
    """What there is while nobody asks anything.

    Attributes:
        usage: of every process.
        num_actors: Ray actors that live.
        held: what engines hold for requests, by engine; empty if nothing.
    """

    usage: tuple[Usage, ...]
    num_actors: int
    held: Mapping[str, Mapping[str, float]]


def find_leaks(before: Idle, after: Idle) -> Iterator[str]:
    """Say what there is more of than before, threads and descriptors beyond a few, and which process went or came."""
    for engine, gauges in after.held.items():
        yield f"{engine} holds {dict(gauges)}"
    if after.num_actors > before.num_actors:
        yield f"{after.num_actors} actors, {before.num_actors} before"
    was, is_now = _lasting(before.usage), _lasting(after.usage)
    for name in was.keys() - is_now.keys():
        yield f"{name} is gone"
    for name in is_now.keys() - was.keys():
        yield f"{name} is new"
    for name in was.keys() & is_now.keys():
        (first,), (last,) = was[name], is_now[name]
        if last.num_threads > first.num_threads + SPARE_THREADS:
            yield f"{name} has {last.num_threads} threads, {first.num_threads} before"
        if last.num_fds > first.num_fds + SPARE_FDS:
            yield f"{name} has {last.num_fds} file descriptors, {first.num_fds} before"


def _lasting(usage: Sequence[Usage]) -> dict[str, list[Usage]]:
    # Of plain workers Ray keeps some in stock, and starts and ends them as it likes.
    return by_process([one for one in usage if one.role != "worker"])
