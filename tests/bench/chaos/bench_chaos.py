"""A storm over the service: engines, replicas and ingresses die, hang and scale under steady load, and clients leave.

Run: `make bench-chaos`. Brings the graph up as `make serve` does, 2 prefill, 2 decode and 2 ingress replicas on logical
CPUs; learns the tokens of a fixed set of requests in calm, twice; then sends them at a steady rate while a storm, drawn
from the seed, is carried out. Prints a line per fault, tables and, as its last line, one JSON object. Exit status 0
only if no token differed, no request was lost, at most 0.5% failed, every pool came back and nothing was left behind.
With `--tier-bytes` the engines share a tier, whose blocks are counted when all is over.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from app.local_process import RunFolder
from tests.bench.chaos import tier
from tests.bench.chaos.cluster import Cluster, Holdings, serving
from tests.bench.chaos.faults import Storm
from tests.bench.chaos.load import Client, Ending, Record, send_steadily
from tests.bench.chaos.probes import Call, Deck, Probe, build_probes
from tests.bench.chaos.report import about, print_problems, print_verdict, record_row, verdict_row, write_samples
from tests.bench.chaos.storm import Done, Fault, Pool, plan_storm
from tests.bench.chaos.verdict import Reference, decide
from tests.bench.progress import timed

PORT = 8013
MODEL = "chaos"
WANTED = {Pool.PREFILL: 2, Pool.DECODE: 2, Pool.INGRESS: 2}
# Most prompts are handed over and not all of them cached; small pools, for 4 to 6 engines share the memory.
ARGUMENTS = ["min_remote_prefill_tokens=48", "engine.num_blocks=256", "engine.max_model_len=1024"]
# What clients ask for who leave within 3 s: too much to be answered by then.
NUM_LEAVERS = 10
LEAVERS_TOKENS = (128, 160)
# In calm, when tokens are learnt; they must not depend on it.
CALM_CLIENTS = 4
# Clients have gone, but an engine may still find out.
SETTLE_S = 30.0


@dataclass(frozen=True)
class Observed:
    """What came of a storm.

    Attributes:
        begun_s: when it began, by the system's monotonic clock.
        ended_s: when the last fault was over.
        faults: what was done.
        records: of every request during it.
        holdings: what engines hold when all requests have ended.
        num_engines: engines that there should be by then.
        left: what is in the tier then; None: there is none.
    """

    begun_s: float
    ended_s: float
    faults: list[Done]
    records: list[Record]
    holdings: Holdings
    num_engines: int
    left: tier.Left | None


async def learn(cluster: Cluster, probes: Sequence[Probe]) -> Reference:
    """Ask for every probe twice.

    Raises:
        RuntimeError: a request failed, with nothing done to the service.
    """
    answers: dict[int, list[list[int]]] = {probe.number: [] for probe in probes}
    async with Client(cluster.url, cluster.model) as client:
        for stream in (False, True):
            for record in await client.send_all([Call(probe, stream) for probe in probes], CALM_CLIENTS):
                number = record.call.probe.number
                if record.ending is not Ending.WHOLE:
                    raise RuntimeError(f"probe {number}, in calm: {record.ending}, {record.error}")
                answers[number].append(record.token_ids)
    return Reference(answers)


async def endure(
    cluster: Cluster, load: Deck, leavers: Deck, plan: Sequence[Fault], options: argparse.Namespace
) -> Observed:
    """Keep the load up, at least until the last fault is over, while the storm is carried out."""
    async with Client(cluster.url, cluster.model) as client:
        ended, begun_s = asyncio.Event(), time.monotonic()
        storm = Storm(cluster, client, leavers)
        sending = asyncio.create_task(send_steadily(client, load, options.rate, options.seed, ended))
        with timed("storm", options.minutes * 60):
            await asyncio.gather(storm.run(plan), asyncio.sleep(options.minutes * 60))
        ended.set()
        ended_s = time.monotonic()
        await sending
        holdings = await cluster.settle(SETTLE_S)
        left = await asyncio.to_thread(tier.count, options.tier_bytes) if options.tier_bytes else None
        return Observed(begun_s, ended_s, storm.done, client.records, holdings, cluster.num_engines, left)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench-chaos ARGS=...")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=60, help="in that time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of requests and faults (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.6, help="requests per second (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=60, help="distinct requests (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="of the service (default: %(default)s)")
    parser.add_argument("--tier-bytes", type=int, default=0, help="of the shared tier; 0: none (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(".run/chaos"), help="for the samples")
    return parser


def main() -> int:
    """0 if every bound was kept."""
    options = _parser().parse_args()
    seed = options.seed
    plan = plan_storm(seed, options.minutes * 60, options.faults)
    short = build_probes(seed, options.probes)
    long = build_probes(seed + 1, NUM_LEAVERS, max_tokens=LEAVERS_TOKENS, first_number=len(short))
    probes = [*short, *long]
    pairs = [*ARGUMENTS, *tier.arguments(options.tier_bytes)]
    with serving(RunFolder(Path(".run/chaos")), options.port, MODEL, WANTED, pairs) as cluster:
        begun_s = time.monotonic()
        reference = asyncio.run(learn(cluster, probes))
        calm_rate = 2 * len(probes) / (time.monotonic() - begun_s)
        unstable = len(reference.unstable)
        print(f"calm: {calm_rate:.2f} requests/s, {unstable} not answered the same twice; now the storm", flush=True)
        seen = asyncio.run(endure(cluster, Deck(short, seed), Deck(long, seed), plan, options))
    tier_problems = list(seen.left.problems()) if seen.left is not None else []
    verdict = decide(seen.records, reference, seen.faults, len(plan), seen.holdings, seen.num_engines)
    figures = {
        "lasted_s": seen.ended_s - seen.begun_s,
        "requests_per_s": options.rate,
        "calm_requests_per_s": calm_rate,
        "verdict": verdict_row(verdict),
        "tier": None if seen.left is None else asdict(seen.left),
        "tier_problems": tier_problems,
    }
    samples = about(
        **figures,
        faults=[asdict(done) | {"at_s": done.at_s - seen.begun_s} for done in seen.faults],
        probes=[asdict(probe) for probe in probes],
        answers=reference.answers,
        requests=[record_row(record, seen.begun_s) for record in seen.records],
    )
    path = write_samples(options.results, "chaos", samples)
    if seen.left is not None:
        print(f"in the tier: {seen.left}")
    print_verdict(verdict)
    print_problems(tier_problems)
    print(f"{seen.ended_s - seen.begun_s:.0f} s; samples: {path}")
    print(json.dumps({"samples": str(path), **figures}))
    return 1 if verdict.problems() or tier_problems else 0


if __name__ == "__main__":
    sys.exit(main())
