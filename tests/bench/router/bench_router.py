"""Which engine a prompt goes to: how much of what could be reused is, how even the load is, and what a decision takes.

Run: `make bench-router ARGS="--trace FILE"`, with a trace in the form of the Mooncake paper's. Plays it in virtual time
to engines that have the real block manager and cost what a step costs, once for each way to choose; times decisions of
one router among many replicas; and sends prompts with one hot prefix. Prints tables and, as its last line, one JSON
object. Ends with 1 if the router keeps less than 95% of the reuse of one infinite cache, or its load is uneven by more
than 1.3 (1.5 for the hot prefix), or the slowest of a hundred decisions takes more than 1 ms of CPU,
once the prompt is hashed; that is done once per prompt, and told too.

Where the rest of the reuse goes is told from further replays: what one cache of the same size as all together loses to
the infinite one is capacity; what one router that knows all at once loses beyond that is spreading; what several
routers lose beyond that, which know by reports each second, is staleness.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deployments.routing.settings import RoutingSettings
from tests.bench.router.decisions import Timings, time_decisions
from tests.bench.router.engines import Speed
from tests.bench.router.policies import BoundedHash, Policy, RandomChoice, RoundRobin, Routers, TwoChoices
from tests.bench.router.replay import Result, replay
from tests.bench.router.trace import BLOCK_SIZE, Arrival, hot_prefix, load_trace, reusable_tokens

TRACE = Path("../shared/traces/mooncake_conversation.jsonl")
SEED = 0
REPORT_DELAY_S = 0.05
# Of the hot prefix.
PREFIX_TOKENS, OWN_TOKENS = 8192, 512
BOUNDS = {"captured": 0.95, "imbalance": 1.3, "hot_imbalance": 1.5, "decision_p99_ms": 1.0}


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one way to choose.

    Attributes:
        captured: found tokens over those that one infinite cache would find.
        imbalance: most computed tokens of an engine over the mean.
    """

    policy: str
    captured: float
    imbalance: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float


def summarise(policy: str, result: Result, reusable: int) -> Row:
    mean_s = sum(result.ttft_s) / len(result.ttft_s)
    return Row(policy, result.found_tokens / reusable, result.imbalance, mean_s, result.ttft(0.5), result.ttft(0.99))


def policies(num_engines: int, num_routers: int) -> dict[str, tuple[Policy, float]]:
    """Ways to choose, and the period of the readings."""
    settings = RoutingSettings()
    others: dict[str, Policy] = {
        "random": RandomChoice(SEED),
        "round robin": RoundRobin(),
        "two choices": TwoChoices(SEED),
        "bounded hash, 2 blocks": BoundedHash(num_engines, 2),
        "bounded hash, 4 blocks": BoundedHash(num_engines, 4),
    }
    return {name: (policy, 1.0) for name, policy in others.items()} | {
        "1 router that knows at once": (Routers(settings, 1, 0.0), 0.05),
        f"{num_routers} routers, reports each second": (Routers(settings, num_routers, REPORT_DELAY_S), 1.0),
    }


def compare(arrivals: Sequence[Arrival], args: argparse.Namespace, speed: Speed) -> tuple[list[Row], dict[str, float]]:
    """Play the trace by each way to choose; the rows, and where the reuse of an infinite cache goes."""
    reusable = reusable_tokens(arrivals)
    num_blocks = args.cache_tokens // BLOCK_SIZE
    rows = []
    print(f"{'':34}{'captured':>10}{'max/mean':>10}{'TTFT mean':>11}{'p50':>8}{'p99':>8}  s")
    for name, (policy, period_s) in policies(args.engines, args.routers).items():
        row = summarise(name, replay(arrivals, policy, args.engines, num_blocks, speed, period_s), reusable)
        rows.append(row)
        print(
            f"{name:34}{row.captured:10.3f}{row.imbalance:10.2f}{row.ttft_mean_s:11.2f}{row.ttft_p50_s:8.2f}"
            f"{row.ttft_p99_s:8.2f}",
            flush=True,
        )
    shared = reusable_tokens(arrivals, args.engines * num_blocks) / reusable
    at_once, late = rows[-2].captured, rows[-1].captured
    losses = {"capacity": 1 - shared, "spreading": shared - at_once, "staleness": at_once - late}
    print(f"of one infinite cache's reuse is lost: {', '.join(f'{v:.1%} to {k}' for k, v in losses.items())}")
    return rows, losses


def percentile_ms(seconds: Sequence[float], share: float) -> float:
    return sorted(seconds)[int(share * len(seconds))] * 1000


def describe_decisions(timings: dict[int, Timings]) -> list[dict[str, float]]:
    """Print and return what decisions took, by size of blocks."""
    rows = []
    for block_size, taken in timings.items():
        whole_s = [a + b for a, b in zip(taken.hashing_s, taken.routing_s, strict=True)]
        row = {
            "block_size": block_size,
            "num_blocks": taken.num_blocks,
            "bytes_per_block": taken.bytes_per_block,
            "routing_p50_ms": percentile_ms(taken.routing_s, 0.5),
            "routing_p99_ms": percentile_ms(taken.routing_s, 0.99),
            "with_hashing_p50_ms": percentile_ms(whole_s, 0.5),
            "with_hashing_p99_ms": percentile_ms(whole_s, 0.99),
            "wall_p99_ms": percentile_ms(taken.wall_s, 0.99),
            "request_p50_ms": percentile_ms(taken.request_s, 0.5),
            "request_p99_ms": percentile_ms(taken.request_s, 0.99),
        }
        rows.append(row)
        print(
            f"decision, blocks of {block_size}, ms of CPU: p50 {row['routing_p50_ms']:.2f}, "
            f"p99 {row['routing_p99_ms']:.2f}; with the prompt's hashes p50 {row['with_hashing_p50_ms']:.2f}, "
            f"p99 {row['with_hashing_p99_ms']:.2f} (wall {row['wall_p99_ms']:.2f}); "
            f"a whole request, both pools, p50 {row['request_p50_ms']:.2f}, p99 {row['request_p99_ms']:.2f}; "
            f"{taken.num_blocks} blocks known, {taken.bytes_per_block:.0f} bytes each"
        )
    return rows


def hot(args: argparse.Namespace, speed: Speed) -> list[dict[str, float]]:
    """Prompts with one prefix, at three loads of the engines if all have it."""
    rows = []
    for utilisation in (0.1, 0.5, 0.8):
        gap_s = OWN_TOKENS * speed.token_s / args.replicas / utilisation
        arrivals = hot_prefix(PREFIX_TOKENS, OWN_TOKENS, args.hot_requests, gap_s)
        routers = Routers(RoutingSettings(), args.routers, REPORT_DELAY_S)
        result = replay(arrivals, routers, args.replicas, args.cache_tokens // BLOCK_SIZE, speed)
        copies = (sum(result.computed_tokens) - args.hot_requests * OWN_TOKENS) / PREFIX_TOKENS
        rows.append({"utilisation": utilisation, "imbalance": result.imbalance, "copies": copies})
        print(
            f"one hot prefix, engines busy {utilisation:.0%}: max/mean {result.imbalance:.2f}, "
            f"computed {copies:.0f} times on {args.replicas} replicas"
        )
    return rows


def main() -> int:
    """Run all, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--max-requests", type=int, help="of the trace; all unless given")
    parser.add_argument("--engines", type=int, default=16, help="that the trace is played to")
    parser.add_argument("--routers", type=int, default=4, help="that do not talk to each other")
    parser.add_argument("--cache-tokens", type=int, default=1_600_000, help="of each engine")
    parser.add_argument("--token-ms", type=float, default=0.25, help="an engine takes for a prompt token")
    parser.add_argument("--replicas", type=int, default=64, help="for the cost of decisions and the hot prefix")
    parser.add_argument("--blocks", type=int, default=100_000, help="cached by these together")
    parser.add_argument("--decisions", type=int, default=4000, help="that are timed")
    parser.add_argument("--hot-requests", type=int, default=6000)
    args = parser.parse_args()
    if not args.trace.exists():
        print(f"no trace at {args.trace}: name one with --trace, see --help", file=sys.stderr)
        return 2
    speed = Speed(token_s=args.token_ms / 1000)
    decisions = describe_decisions(
        {size: time_decisions(args.replicas, args.blocks, size, args.decisions, 500, SEED) for size in (256, 16)}
    )
    hot_rows = hot(args, speed)
    arrivals = load_trace(args.trace, args.max_requests)
    rows, losses = compare(arrivals, args, speed)
    ours = rows[-1]
    passed = {
        "captured": ours.captured >= BOUNDS["captured"],
        "imbalance": ours.imbalance <= BOUNDS["imbalance"],
        "hot_imbalance": max(row["imbalance"] for row in hot_rows) <= BOUNDS["hot_imbalance"],
        "decision_p99_ms": max(row["routing_p99_ms"] for row in decisions) <= BOUNDS["decision_p99_ms"],
    }
    for name, is_met in passed.items():
        print(f"{name}: bound {BOUNDS[name]} {'met' if is_met else 'NOT met'}")
    report = {
        "bench": "router",
        "trace": args.trace.name,
        "num_requests": len(arrivals),
        "args": {name: str(value) for name, value in vars(args).items()},
        "decisions": decisions,
        "hot_prefix": hot_rows,
        "replay": [asdict(row) for row in rows],
        "losses": losses,
        "bounds": BOUNDS,
        "passed": passed,
    }
    print(json.dumps(report))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
