"""What the benches print and write: tables for people, and raw samples with what it takes to repeat them."""

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load_tests.environment import describe
from tests.bench.chaos.load import Record
from tests.bench.chaos.verdict import Verdict

_PACKAGES = ("ray", "torch", "transformers", "numba", "httpx")


def about(**more: Any) -> dict[str, Any]:
    """Command, commit, hardware and versions."""
    return describe(server_versions={name: importlib.metadata.version(name) for name in _PACKAGES}, **more)


def write_samples(folder: Path, name: str, samples: dict[str, Any]) -> Path:
    """Write raw samples into a file of their own, named after the bench and the time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(samples, indent=1))
    return path


def record_row(record: Record, since_s: float) -> dict[str, Any]:
    """A request for the file of samples: its probe by number, times since the beginning."""
    call = record.call
    return {
        "probe": call.probe.number,
        "stream": call.stream,
        "leaves_after_s": call.leaves_after_s,
        "sent_s": record.sent_s - since_s,
        "times_s": [at_s - since_s for at_s in record.times_s],
        "end_s": None if record.end_s is None else record.end_s - since_s,
        "status": record.status,
        "ending": record.ending,
        "error": record.error,
        "token_ids": record.token_ids,
    }


def print_verdict(verdict: Verdict) -> None:
    """The table of a storm, and what is beyond its bound."""
    print(f"\n{'fault':>26} {'times':>6} {'recovery p50 s':>15} {'p99 s':>7} {'longest wait meanwhile s':>25}")
    for kind, one in verdict.recoveries.items():
        cells = [f"{value:.1f}" if value is not None else "-" for value in (one.p50_s, one.p99_s)]
        print(f"{kind:>26} {one.num:>6} {cells[0]:>15} {cells[1]:>7} {one.longest_wait_s:>25.1f}")
    print(f"\nrequests: {verdict.num_sent} sent, " + ", ".join(f"{n} {name}" for name, n in verdict.outcomes.items()))
    print(f"failed through no fault of their clients: {verdict.failed_share:.2%}")
    for words, count in verdict.failed.items():
        print(f"  {count} x {words}")
    for other in verdict.differences:
        print(f"  probe {other.probe} ({other.outcome}): token {other.at} is another one")
    for engine, gauges in verdict.leaks.items():
        print(f"  {engine} holds {gauges}")
    print_problems(verdict.problems())


def print_problems(problems: Sequence[str]) -> None:
    print("\n" + "\n".join(["every bound kept"] if not problems else [f"BEYOND ITS BOUND: {one}" for one in problems]))


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict for JSON."""
    counted = {"num_sent": verdict.num_sent, "failed_share": verdict.failed_share, "problems": verdict.problems()}
    return counted | asdict(verdict)
