"""The service at 70% of its capacity for long: memory, threads, descriptors, actors and blocks, at the end as before.

Run: `make bench-soak`. Brings the graph up as `make serve` does, measures how many requests per second it finishes with
clients that never pause, and then sends 70% of that, of which one in ten leaves. Memory of every process is sampled
under load, all else is counted while idle, before and after. Prints tables and, as its last line, one JSON object. Exit
status 0 only if no process's memory rises, nothing leaked and no request failed. With `--tier-bytes` the engines share
a tier, whose blocks are counted in the end.

Of memory that processes share each counts what it has touched, so that in which engines read each other's KV would
count several times, and seem to rise until all of it has been written to once. Its size is fixed when an engine starts:
it has a table of its own, and what must not rise is what a process shares with nobody.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from app.local_process import RunFolder
from tests.bench.chaos import tier
from tests.bench.chaos.cluster import Cluster, live_actors, serving
from tests.bench.chaos.load import Client, Ending, Record, send_steadily
from tests.bench.chaos.probes import Call, Deck, build_probes
from tests.bench.chaos.report import about, print_problems, write_samples
from tests.bench.chaos.storm import Pool
from tests.bench.chaos.verdict import find_leaks as find_held
from tests.bench.progress import timed
from tests.bench.soak.processes import Usage, take
from tests.bench.soak.verdict import Idle, Trend, find_leaks, fit_trends

PORT = 8014
MODEL = "soak"
WANTED = {Pool.PREFILL: 1, Pool.DECODE: 1, Pool.INGRESS: 2}
# Small pools: all of their memory has been touched when the steady state begins.
ARGUMENTS = ["min_remote_prefill_tokens=48", "engine.num_blocks=256", "engine.max_model_len=1024"]
LOAD_SHARE = 0.7
LEAVE_SHARE = 0.1
# For as many clients at once capacity is measured.
NUM_CLIENTS = 8
# A process may grow by less than this and count as flat: 1 GiB in 4 days.
MAX_MIB_PER_HOUR = 10.0
# From idle to the steady state; not sampled.
_RAMP_S = 20.0
_SETTLE_S = 30.0


@dataclass(frozen=True)
class Soaked:
    """What came of a run.

    Attributes:
        capacity: requests per second that were finished by clients that never pause.
        before: idle, after the warm-up.
        after: idle, at the end.
        samples: of every process under load.
        records: of every request in the steady state.
        left: what is in the tier at the end; None: there is none.
    """

    capacity: float
    before: Idle
    after: Idle
    samples: list[Usage]
    records: list[Record]
    left: tier.Left | None


class Soak:
    """One run.

    Args:
        cluster: the service.
        options: of the command line.
    """

    def __init__(self, cluster: Cluster, options: argparse.Namespace) -> None:
        self._cluster = cluster
        self._options = options
        self._probes = build_probes(options.seed, options.probes)

    async def run(self) -> Soaked:
        """Measure capacity, warm up, count, load, count."""
        options = self._options
        capacity = await self._measure_capacity(options.capacity_s)
        print(f"capacity: {capacity:.2f} requests/s; load: {capacity * LOAD_SHARE:.2f}", flush=True)
        await self._load(capacity * LOAD_SHARE, options.warm_up * 60, [])
        before = await self._idle()
        samples: list[Usage] = []
        records = await self._load(capacity * LOAD_SHARE, options.minutes * 60, samples)
        after = await self._idle()
        left = await asyncio.to_thread(tier.count, options.tier_bytes) if options.tier_bytes else None
        return Soaked(capacity, before, after, samples, records, left)

    async def _measure_capacity(self, seconds: float) -> float:
        deck, begun_s = Deck(self._probes, self._options.seed), time.monotonic()

        def calls() -> Iterator[Call]:
            while time.monotonic() < begun_s + seconds:
                yield deck.draw()

        async with Client(self._cluster.url, MODEL) as client:
            records = await client.send_all(calls(), NUM_CLIENTS)
        return sum(one.ending is Ending.WHOLE for one in records) / (time.monotonic() - begun_s)

    async def _load(self, rate: float, seconds: float, samples: list[Usage]) -> list[Record]:
        """Keep the load up, and sample the processes from when it is steady to its end."""
        ended, end_s = asyncio.Event(), time.monotonic() + seconds
        deck = Deck(self._probes, self._options.seed, LEAVE_SHARE)
        async with Client(self._cluster.url, MODEL) as client:
            load = asyncio.create_task(send_steadily(client, deck, rate, self._options.seed, ended))
            await asyncio.sleep(_RAMP_S)
            with timed("load", seconds):
                while time.monotonic() < end_s:
                    samples += await asyncio.to_thread(take, self._cluster.server.processes(), time.monotonic())
                    await asyncio.sleep(self._options.every_s)
            ended.set()
            await load
        return client.records

    async def _idle(self) -> Idle:
        held = find_held(await self._cluster.settle(_SETTLE_S))
        # Connections of the last requests are closed by and by.
        await asyncio.sleep(_SETTLE_S)
        usage = take(self._cluster.server.processes(), time.monotonic())
        return Idle(tuple(usage), len(await asyncio.to_thread(live_actors)), held)


def print_trends(uss: dict[str, Trend], rss: dict[str, Trend]) -> None:
    """The table of memory: what a process shares with nobody, and the slope of all that it has mapped."""
    print(
        f"\n{'process':>24} {'first MiB':>10} {'last MiB':>9} {'MiB/hour':>9} {'95% interval':>19} {'with shared':>11}"
    )
    for name, trend in uss.items():
        interval = "{:.1f} to {:.1f}".format(*trend.interval)
        print(
            f"{name:>24} {trend.first_mib:>10.1f} {trend.last_mib:>9.1f} {trend.mib_per_hour:>9.1f} {interval:>19} "
            f"{rss[name].mib_per_hour:>11.1f}"
        )


def print_arenas(before: Idle, after: Idle) -> None:
    """The table of what engines have written of the memory that others read."""
    was = {usage.pid: usage.arena_bytes for usage in before.usage}
    print(f"\n{'shared KV':>24} {'first MiB':>10} {'last MiB':>9} {'of':>9}")
    for usage in after.usage:
        if usage.arena_size:
            first, last, size = (n / 2**20 for n in (was.get(usage.pid, 0), usage.arena_bytes, usage.arena_size))
            print(f"{usage.role + ' ' + str(usage.pid):>24} {first:>10.1f} {last:>9.1f} {size:>9.1f}")


def find_problems(soaked: Soaked, uss: dict[str, Trend]) -> list[str]:
    """In words what is beyond its bound."""
    rising = [name for name, trend in uss.items() if not trend.is_flat(MAX_MIB_PER_HOUR)]
    endings = Counter(one.ending for one in soaked.records)
    failed = {ending: n for ending, n in endings.items() if ending not in (Ending.WHOLE, Ending.LEFT)}
    problems = [f"memory of {name} rises by {uss[name].mib_per_hour:.1f} MiB per hour" for name in rising]
    problems += find_leaks(soaked.before, soaked.after)
    problems += soaked.left.problems() if soaked.left is not None else ()
    return problems + [f"{count} requests ended with: {ending}" for ending, count in failed.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-soak ARGS=...")
    parser.add_argument("--minutes", type=float, default=20.0, help="of steady load (default: %(default)s)")
    parser.add_argument("--warm-up", type=float, default=5.0, help="minutes before that (default: %(default)s)")
    parser.add_argument("--capacity-s", type=float, default=60.0, help="to measure capacity (default: %(default)s)")
    parser.add_argument("--every-s", type=float, default=5.0, help="between samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the requests (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=60, help="distinct requests (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="of the service (default: %(default)s)")
    parser.add_argument("--tier-bytes", type=int, default=0, help="of the shared tier; 0: none (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(".run/soak"), help="for the samples")
    return parser


def main() -> int:
    """0 if nothing was gathered and nothing failed."""
    options = _parser().parse_args()
    pairs = [*ARGUMENTS, *tier.arguments(options.tier_bytes)]
    with serving(RunFolder(Path(".run/soak")), options.port, MODEL, WANTED, pairs) as cluster:
        soaked = asyncio.run(Soak(cluster, options).run())
    rss = fit_trends(soaked.samples, lambda usage: usage.rss_bytes)
    uss = fit_trends(soaked.samples, lambda usage: usage.uss_bytes)
    problems = find_problems(soaked, uss)
    endings = Counter(one.ending for one in soaked.records)
    result = {
        "capacity": soaked.capacity,
        "load": soaked.capacity * LOAD_SHARE,
        "requests": endings,
        "rss": {name: asdict(trend) for name, trend in rss.items()},
        "uss": {name: asdict(trend) for name, trend in uss.items()},
        "idle_before": asdict(soaked.before),
        "idle_after": asdict(soaked.after),
        "tier": None if soaked.left is None else asdict(soaked.left),
        "problems": problems,
    }
    path = write_samples(options.results, "soak", about(**result, samples=[asdict(one) for one in soaked.samples]))
    print_trends(uss, rss)
    print_arenas(soaked.before, soaked.after)
    if soaked.left is not None:
        print(f"\nin the tier: {soaked.left}")
    print(f"\nrequests: {dict(endings)}\nsamples: {path}")
    print_problems(problems)
    print(json.dumps({"samples": str(path), **result}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
