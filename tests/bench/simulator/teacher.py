"""Learns the simulator's curves from a service's `/metrics`, while it serves.

Reads it once a second; what steps cost is learned by the classes that admission and the planner learn it with.
"""

import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

from prometheus_client.parser import text_string_to_metric_families

from deployments.engine.stats import EngineStats, Histogram
from deployments.load.decode_steps import decode_steps_between
from deployments.load.step_cost import StepCost
from deployments.planner.gap_learner import GapLearner
from deployments.simulator.curves import Curves
from tests.bench.simulator.alone import Means

_PERIOD_S = 1.0
# All that is measured is to count alike.
_HALF_LIFE_S = 1e6
# As `deployments/telemetry/pool_metrics.py` names them.
_GAUGES = {
    "num_running": "running_sequences",
    "num_reserved": "reserved_sequences",
    "num_used_blocks": "kv_blocks_used",
}
_SIZES = {"max_num_seqs": "max_sequences", "num_blocks": "kv_blocks"}
_COUNTERS = {
    "steps": "engine_steps",
    "prefill_steps": "prefill_steps",
    "prefill_s": "prefill_seconds",
    "prefill_gaps": "prefill_step_gaps",
    "prefill_gap_s": "prefill_step_gap_seconds",
    "prompt_tokens": "prompt_tokens",
    "finished": "finished_sequences",
}
_SECONDS = ("prefill_s", "prefill_gap_s")
# Share of a second for which prefill computed, that tells of decode alone, and of decode beside it.
_IDLE, _BUSY = 0.05, 0.9


@dataclass(slots=True)
class Totals:
    """Of a histogram: how many, and their sum."""

    count: float = 0.0
    seconds: float = 0.0

    def since(self, before: "Totals") -> "Totals":
        return Totals(self.count - before.count, self.seconds - before.seconds)

    @property
    def mean_s(self) -> float:
        return self.seconds / self.count if self.count else 0.0


@dataclass(slots=True)
class Snapshot:
    """What `/metrics` says of both pools at once.

    Attributes:
        engines: by pool and replica.
        ttft: at the engines of each pool; those of decode count up to the first token of their own.
        handoff: chunks that were handed over, of all engines together.
        at_s: when it was taken.
    """

    engines: dict[tuple[str, str], EngineStats] = field(default_factory=dict)
    ttft: dict[str, Totals] = field(default_factory=dict)
    handoff: Totals = field(default_factory=Totals)
    at_s: float = 0.0


def read_metrics(port: int, block_size: int) -> Snapshot:
    """Ask the service on this machine."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        return replace(parse_metrics(response.read().decode(), block_size), at_s=time.monotonic())


def parse_metrics(text: str, block_size: int) -> Snapshot:
    """Read Prometheus' text, which does not say how many tokens a KV block has."""
    values: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "replica" in sample.labels and "le" not in sample.labels:
                key = sample.labels["pool"], sample.labels["replica"]
                values[key][sample.name.removeprefix("kvrelay_")] = sample.value
    snapshot = Snapshot()
    for key, own in values.items():
        snapshot.engines[key] = _engine(own, block_size)
        ttft = snapshot.ttft.setdefault(key[0], Totals())
        for totals, name in ((ttft, "engine_ttft_seconds"), (snapshot.handoff, "handoff_seconds")):
            totals.count += own[f"{name}_count"]
            totals.seconds += own[f"{name}_sum"]
    return snapshot


def _engine(own: dict[str, float], block_size: int) -> EngineStats:
    stats = EngineStats(block_size=block_size)
    for attribute, name in (_GAUGES | _SIZES).items():
        setattr(stats, attribute, int(own[name]))
    for attribute, name in _COUNTERS.items():
        value = own[f"{name}_total"]
        setattr(stats, attribute, value if attribute in _SECONDS else int(value))
    # Only the sum and the count are asked for; in which bucket they lie makes no difference.
    stats.itl_s = Histogram(total=own["engine_itl_seconds_sum"])
    stats.itl_s.counts[-1] = int(own["engine_itl_seconds_count"])
    return stats


Watch = Sequence[Snapshot]


@contextmanager
def watching(port: int, block_size: int) -> Iterator[list[Snapshot]]:
    """Take a snapshot of the service on a port now, one every second, and one at the end."""
    over, snapshots = threading.Event(), [read_metrics(port, block_size)]

    def watch() -> None:
        while not over.wait(_PERIOD_S):
            snapshots.append(read_metrics(port, block_size))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield snapshots
    finally:
        over.set()
        thread.join()
        snapshots.append(read_metrics(port, block_size))


class Teacher:
    """Tells what snapshots of a service teach.

    Args:
        watches: snapshots, one after the other; what happened between two of these is not known.
    """

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches

    def ttft(self, pool: str) -> Totals:
        """At the engines of a pool, of what they served while they were watched."""
        return self._sum(lambda snapshot: snapshot.ttft[pool])

    @property
    def handoff(self) -> Totals:
        """Of chunks, likewise."""
        return self._sum(lambda snapshot: snapshot.handoff)

    @property
    def handoff_s(self) -> float:
        """What a chunk takes to a decode engine that has nothing to do.

        It is put into the pool between two steps, and the time that is told ends then. The wait for the step that runs
        the simulator makes by itself, so it is taken off: in the mean, half of a step while the engine is busy.
        """
        return max(0.0, self.handoff.mean_s - self._mean_wait_s("decode"))

    @property
    def means(self) -> Means:
        """Of steps, those with prompts with all that is in them."""
        return Means(self._sum(_gaps).mean_s, self._sum(_prompts).mean_s)

    def _mean_wait_s(self, pool: str) -> float:
        """Until the end of the step that runs, for what comes at any time to an engine of a pool."""
        passed_s = sum(watch[-1].at_s - watch[0].at_s for watch in self._watches)
        waits = 0.0
        for before, now in self._pairs(pool):
            if (steps := decode_steps_between(now, before)) is not None:
                waits += steps.seconds * steps.seconds / steps.steps / 2
            if num_prompts := now.prefill_steps - before.prefill_steps:
                waits += (now.prefill_s - before.prefill_s) ** 2 / num_prompts / 2
        num_engines = len({key for watch in self._watches for key in watch[-1].engines if key[0] == pool})
        return waits / (passed_s * num_engines) if passed_s and num_engines else 0.0

    def _sum(self, of: Callable[[Snapshot], Totals]) -> Totals:
        parts = [of(watch[-1]).since(of(watch[0])) for watch in self._watches]
        return Totals(sum(part.count for part in parts), sum(part.seconds for part in parts))

    def curves(self, pool: str, max_num_batched_tokens: int, elsewhere_s: float = 0.0) -> Curves:
        """Of the engines of one pool.

        Args:
            pool: its name.
            max_num_batched_tokens: of a step.
            elsewhere_s: that a prompt token takes in the other pool, for one that computes none.

        Raises:
            ValueError: they did nothing while they were watched.
        """
        gaps, prompts = GapLearner(), StepCost(_HALF_LIFE_S)
        totals = EngineStats()
        last = EngineStats()
        for before, now in self._pairs(pool):
            last = now
            if (steps := decode_steps_between(now, before)) is not None:
                kv_tokens = now.num_used_blocks * now.block_size * now.num_running / max(1, _seated(now))
                gaps.add(steps.sequences / steps.steps, kv_tokens, steps.seconds / steps.steps, steps.seconds)
            tokens, seconds = now.prompt_tokens - before.prompt_tokens, now.prefill_s - before.prefill_s
            prompts.add(now.prefill_steps - before.prefill_steps, tokens, seconds)
            totals.steps += now.steps - before.steps
            totals.prompt_tokens += tokens
            totals.prefill_s += seconds
            totals.prefill_steps += now.prefill_steps - before.prefill_steps
            totals.prefill_gaps += now.prefill_gaps - before.prefill_gaps
        curves = Curves(
            *_costs(gaps, prompts, totals, elsewhere_s),
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=last.max_num_seqs,
            num_kv_tokens=last.num_blocks * last.block_size,
        )
        if not totals.steps:
            raise ValueError(f"the engines of {pool} ran no step while they were watched")
        return replace(curves, handoff_s=self.handoff_s, handoff_token_s=0.0)

    def _pairs(self, pool: str) -> Iterator[tuple[EngineStats, EngineStats]]:
        for watch in self._watches:
            for before, now in pairwise(watch):
                for key, stats in now.engines.items():
                    if key[0] == pool and key in before.engines:
                        yield before.engines[key], stats


def learn_slowdown(watches: Sequence[Watch]) -> float:
    """Times that a decode step takes as long while the prefill engine computes; by seconds in which it always did.

    Args:
        watches: of one answer that is drawn all the time, now and then beside many prompts.

    Raises:
        ValueError: there were no such seconds, or none in which prefill did nothing.
    """
    alone_s, beside_s = list[float](), list[float]()
    for watch in watches:
        for before, now in pairwise(watch):
            share = _prefill_s(now) - _prefill_s(before)
            share /= max(now.at_s - before.at_s, 1e-9)
            found = alone_s if share < _IDLE else beside_s if share > _BUSY else None
            if found is not None:
                found += _decode_step_s(before, now)
    if not alone_s or not beside_s:
        raise ValueError(
            f"{len(alone_s)} seconds tell of decode alone and {len(beside_s)} of both: one of each is needed"
        )
    return max(1.0, median(beside_s) / median(alone_s))


def _prefill_s(snapshot: Snapshot) -> float:
    return _prompts(snapshot).seconds


def _decode_step_s(before: Snapshot, now: Snapshot) -> list[float]:
    pairs = [
        (now.engines[key], before.engines[key]) for key in now.engines.keys() & before.engines if key[0] == "decode"
    ]
    found = (decode_steps_between(*pair) for pair in pairs)
    return [steps.seconds / steps.steps for steps in found if steps is not None]


def _gaps(snapshot: Snapshot) -> Totals:
    gaps = [engine.itl_s for (pool, _), engine in snapshot.engines.items() if pool == "decode"]
    return Totals(sum(sum(one.counts) for one in gaps), sum(one.total for one in gaps))


def _prompts(snapshot: Snapshot) -> Totals:
    engines = [engine for (pool, _), engine in snapshot.engines.items() if pool == "prefill"]
    return Totals(sum(engine.prompt_tokens for engine in engines), sum(engine.prefill_s for engine in engines))


def _seated(engine: EngineStats) -> int:
    return engine.num_running + engine.num_reserved


def _costs(
    gaps: GapLearner, prompts: StepCost, totals: EngineStats, elsewhere_s: float
) -> tuple[float, float, float, float]:
    """Of a step, a prompt token, a sequence, a token of its KV."""
    step_s, token_s = prompts.seconds(1.0, 0.0).best, prompts.seconds(0.0, 1.0).best
    costs = gaps.costs(token_s or elsewhere_s)
    if costs is None:
        return step_s, token_s, 0.0, 0.0
    step_s, sequence_s, kv_s = costs
    # What sequences take in steps with prompts is not the prompts'.
    own_s = totals.prefill_s - step_s * totals.prefill_steps - sequence_s * totals.prefill_gaps
    token_s = max(0.0, own_s) / totals.prompt_tokens if totals.prompt_tokens else elsewhere_s
    return step_s, token_s, sequence_s, kv_s
