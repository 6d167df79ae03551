"""A scenario of the load tests on two replicas of each pool: routed by Ray Serve, and by cached prefixes with a tier.

Both ways get the same requests at the same times, in turn. Told are the prompt tokens that engines computed, by the
engines' own count, and how long clients waited for their first token. What a cache of everybody's, that forgets
nothing, would have left to compute is told as well: nobody can do with less. Receipts tell where the rest was lost.
"""

import argparse
import asyncio
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.local_process import RunFolder
from load_tests.environment import describe
from load_tests.samples import Run
from load_tests.scenario import Scenario, load_scenario
from load_tests.schedule import Planned, build_schedule
from tests.bench.player import run
from tests.bench.prefix.losses import KINDS, losses, told_of
from tests.bench.service import serving
from tests.bench.serving.client import Reply

MODEL = "smollm2-135m-instruct"
BLOCK_SIZE = 16
SERVE, OURS = "Ray Serve", "by prefix, with the tier"
MIN_FEWER, MAX_TTFT = 2.0, 0.6
_ORIGIN = re.compile(
    r'^kvrelay_prompt_tokens_by_origin_total\{origin="(\w+)",pool="(\w+)",([^}]*)\} (\S+)$', re.MULTILINE
)
# Of both pools. On a busy machine some do not answer in time for a page of metrics.
_NUM_REPLICAS = 4
_ASKS = 60
_DRAIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Played:
    """What came of one way in one round.

    Attributes:
        run: as clients saw it.
        origins: prompt tokens by pool and where their KV came from.
        least: prompt tokens that one cache for all would have computed of what was sent.
        losses: where what was computed beyond that could have been found; see `losses`.
    """

    run: Run
    origins: dict[str, float]
    least: int
    losses: dict[str, int]

    @property
    def computed(self) -> float:
        return sum(count for name, count in self.origins.items() if name.endswith(" miss"))


class Bench:
    """One scenario by both ways.

    Args:
        args: of the command line; see `bench_prefix.py`.
        arguments: of the service, but for how it routes.
        warm_up: has every engine meet every other.
    """

    def __init__(self, args: argparse.Namespace, arguments: Sequence[str], warm_up: Any) -> None:
        self._args = args
        self._warm_up = warm_up
        self.scenario: Scenario = load_scenario(args.scenario, {"duration_s": args.duration, "drain_s": _DRAIN_S})
        pool = [f"engine.num_blocks={args.num_blocks}"] if args.num_blocks else []
        self._ways = {
            SERVE: [*arguments, *pool, "routing.by_prefix=false"],
            OURS: [*arguments, *pool, f"tier.max_bytes={args.tier_bytes}", f"tier.object_bytes={args.object_bytes}"],
        }
        if args.ours:
            del self._ways[SERVE]
        self.played: dict[str, list[Played]] = defaultdict(list)
        self.loads: list[float] = []

    def play(self, folder: RunFolder) -> None:
        """All rounds."""
        for round_ in range(self._args.rounds):
            for way in list(self._ways)[:: -1 if round_ % 2 else 1]:
                self.played[way].append(self._play(folder, way, round_))
                self._tell(way)

    def _play(self, folder: RunFolder, way: str, round_: int) -> Played:
        with serving(folder, self._args.port, self._ways[way]):
            asyncio.run(self._warm_up())
            before = read_origins(self._args.port)
            receipts: list[tuple[Planned, Reply]] = []
            taken = run(self.scenario, self._args.port, MODEL, way, round_, self._args.load, receipts)
            after = read_origins(self._args.port)
        sent = {(sample.session, sample.turn) for sample in taken.samples}
        schedule = build_schedule(self.scenario, f"{self.scenario.name}/{round_}/{self._args.load:g}", self._args.load)
        least = least_computed([one for one in schedule if (one.session, one.turn) in sent])
        lost = losses(told_of(receipts), BLOCK_SIZE)
        return Played(taken, {name: after[name] - before[name] for name in after}, least, lost)

    def _tell(self, way: str) -> None:
        last = self.played[way][-1]
        failed = sum(sample.error is not None for sample in last.run.samples)
        self.loads.append(float(Path("/proc/loadavg").read_text().split()[0]))
        problems = "".join(f"; {problem}" for problem in last.run.generator.problems)
        lost = ", ".join(f"{count} {kind}" for kind, count in last.losses.items())
        print(
            f"{way}: {len(last.run.samples)} requests, {failed} failed, {last.computed:.0f} tokens computed "
            f"(at least {last.least}; beyond that {lost}), "
            f"TTFT p50 {percentile_s([last], 50):.2f}, p95 {percentile_s([last], 95):.2f} s; "
            f"load {self.loads[-1]:.1f}{problems}",
            flush=True,
        )


def least_computed(schedule: Sequence[Planned]) -> int:
    """Prompt tokens that one cache for all would compute, each prompt at once where the one before left its blocks."""
    known: set[tuple[int, ...]] = set()
    computed = 0
    for request in sorted(schedule, key=lambda one: one.turn):
        prompt, depth = request.prompt, 0
        while (depth + 1) * BLOCK_SIZE < len(prompt) and prompt[: (depth + 1) * BLOCK_SIZE] in known:
            depth += 1
        computed += len(prompt) - depth * BLOCK_SIZE
        known |= {prompt[: end * BLOCK_SIZE] for end in range(1, len(prompt) // BLOCK_SIZE + 1)}
    return computed


def read_origins(port: int) -> dict[str, float]:
    """Prompt tokens so far by pool and origin, once all replicas have told theirs."""
    for _ in range(_ASKS):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            told = _ORIGIN.findall(response.read().decode())
        if len({(pool, replica) for _, pool, replica, _ in told}) == _NUM_REPLICAS:
            break
        time.sleep(1.0)
    else:
        raise RuntimeError(f"{_NUM_REPLICAS} replicas have not told their numbers at once, asked {_ASKS} times")
    found: dict[str, float] = defaultdict(float)
    for origin, pool, _, count in told:
        found[f"{pool} {origin}"] += float(count)
    return dict(found)


def percentile_s(played: Sequence[Played], share: float) -> float:
    """Of the times to a first token in the steady state."""
    ttft_s = [s.ttft_s for one in played for s in one.run.measured() if s.ttft_s is not None]
    return float(np.percentile(ttft_s, share))


def report(bench: Bench) -> dict[str, Any]:
    """Print the table and what it says of the bounds; the same as one object."""
    print(f"\n{'':26}{'computed':>9}{'least':>8}{'of':>9}{'TTFT p50':>10}{'p95':>7}{'p99':>7} s   prompt tokens from")
    rows: dict[str, dict[str, Any]] = {}
    for way, played in bench.played.items():
        origins = {name: sum(one.origins.get(name, 0.0) for one in played) for name in played[0].origins}
        row = {
            "computed": sum(one.computed for one in played),
            "least": sum(one.least for one in played),
            "prompt_tokens": sum(sample.prompt_tokens for one in played for sample in one.run.samples),
            "losses": {kind: sum(one.losses[kind] for one in played) for kind in KINDS},
            **{f"ttft_p{share}_s": percentile_s(played, share) for share in (50, 95, 99)},
            "failed": sum(sample.error is not None for one in played for sample in one.run.samples),
        }
        rows[way] = row | {"origins": origins}
        print(
            f"{way:26}{row['computed']:9.0f}{row['least']:8}{row['prompt_tokens']:9}{row['ttft_p50_s']:10.2f}{row['ttft_p95_s']:7.2f}"
            f"{row['ttft_p99_s']:7.2f}     {', '.join(f'{k} {v:.0f}' for k, v in sorted(origins.items()) if v)}"
        )
    ours = rows[OURS]
    captured = (ours["prompt_tokens"] - ours["computed"]) / max(1, ours["prompt_tokens"] - ours["least"])
    result: dict[str, Any] = {"captured": captured}
    print(f"captured: {captured:.3f} of the reuse that one cache that forgets nothing would give")
    if SERVE in rows:
        result |= compare(rows[SERVE], ours, float(np.mean(bench.loads)))
    raw = {way: [asdict(one) for one in played] for way, played in bench.played.items()}
    about = describe(scenario=bench.scenario.model_dump(mode="json"))
    return {"about": about, **result, "ways": rows, "runs": raw}


def compare(serve: dict[str, Any], ours: dict[str, Any], load: float) -> dict[str, float]:
    """Print what ours is worth beside Serve's own way; the same as one object."""
    fewer = serve["computed"] / ours["computed"]
    p95 = ours["ttft_p95_s"] / serve["ttft_p95_s"]
    most = serve["computed"] / serve["least"]
    print(
        f"tokens computed: {fewer:.2f} times fewer (asked {MIN_FEWER:g}; one cache that forgets nothing: {most:.2f}); "
        f"TTFT p95 {p95:.2f} times (asked {MAX_TTFT:g}); load {load:.1f}"
    )
    return {"fewer": fewer, "most_possible": most, "p95": p95}
