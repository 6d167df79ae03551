"""What the tier costs prompts that share nothing: one engine, with it and without it in turn, and a control.

Each round generates the same amount three times, in an order that changes: with the tier, without it, and without it
once more. Wall time of a shared machine differs between rounds by more than the tier may cost; the two without it tell
by how much. So a round's ratio is of its own three times, and the median of all rounds comes with its interval. CPU
seconds differ less: they count what the engine's threads, the index and Ray have used, whoever else runs beside them.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from math import comb
from time import perf_counter

import ray

from tests.bench.tier.switched import Spent, spent
from tests.engine_pair import DrivenEngine

WAYS = ON, OFF, CONTROL = "on", "off", "control"
_ORDERS = list(permutations(WAYS))
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and where it lies, with a confidence of at least 95% if there are six values or more.

    Attributes:
        median: of the values.
        low: the interval's beginning.
        high: its end.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """By order statistics: nothing is assumed of how the values are distributed.

        Source: the sign test's interval for a median (Conover, Practical Nonparametric Statistics, section 3.2).
        """
        ordered, num = sorted(values), len(values)
        left_out, tail = 0, 1.0 / 2**num
        while tail + comb(num, left_out + 1) / 2**num <= (1 - _CONFIDENCE) / 2 and left_out + 1 < (num + 1) // 2:
            left_out += 1
            tail += comb(num, left_out) / 2**num
        return cls(statistics.median(ordered), ordered[left_out], ordered[num - 1 - left_out])

    def __str__(self) -> str:
        return f"{self.median - 1:+.1%} ({self.low - 1:+.1%} to {self.high - 1:+.1%})"


@dataclass(slots=True)
class Costs:
    """What rounds took.

    Attributes:
        wall_s: of each round, by way.
        cpu_s: CPU seconds of engine, index and Ray, likewise.
        threads_s: CPU seconds of the engine's threads by kind and of the other processes, likewise; all rounds.
        load: the machine's load average after each round, other work included.
    """

    wall_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    threads_s: dict[str, dict[str, float]] = field(default_factory=lambda: {way: {} for way in WAYS})
    load: list[float] = field(default_factory=list)

    def add(self, way: str, wall_s: float, used: Spent) -> None:
        """One of a round's three."""
        self.wall_s[way].append(wall_s)
        self.cpu_s[way].append(used.total)
        sums = self.threads_s[way]
        for kind, seconds in (used.engine | used.others).items():
            sums[kind] = sums.get(kind, 0.0) + seconds


def ratios(taken_s: dict[str, list[float]]) -> dict[str, Interval]:
    """With the tier over without it, and without it over without it once more, round by round."""
    rounds = list(zip(taken_s[ON], taken_s[OFF], taken_s[CONTROL], strict=True))
    return {
        ON: Interval.of([on / ((off + control) / 2) for on, off, control in rounds]),
        CONTROL: Interval.of([control / off for _, off, control in rounds]),
    }


def judge(ratio: Interval, max_slowdown: float) -> str:
    """Whether the bound is kept, as far as that can be told."""
    if ratio.high <= 1 + max_slowdown:
        return "kept"
    return "not kept" if ratio.low > 1 + max_slowdown else "not told: the interval holds the bound"


def measure(engine: DrivenEngine, generate: Callable[[], None], settle: Callable[[], None], num_rounds: int) -> Costs:
    """Play the rounds.

    Args:
        engine: with a `SwitchedActor`.
        generate: has it compute and generate the same amount each time, and waits for it.
        settle: waits until nothing is on its way to the tier.
        num_rounds: of three each.
    """
    costs = Costs()
    for number in range(num_rounds):
        for way in _ORDERS[number % len(_ORDERS)]:
            ray.get(engine.actor.switch.remote(way == ON))
            before, begun_s = spent(engine.actor, engine.info.pid), perf_counter()
            generate()
            wall_s = perf_counter() - begun_s
            costs.add(way, wall_s, spent(engine.actor, engine.info.pid).since(before))
            if way == ON:
                settle()
        costs.load.append(os.getloadavg()[0])
        took = ", ".join(f"{way} {costs.wall_s[way][-1]:.2f}" for way in WAYS)
        print(f"round {number + 1}: {took} s; load {costs.load[-1]:.1f}", flush=True)
    ray.get(engine.actor.switch.remote(False))
    return costs
