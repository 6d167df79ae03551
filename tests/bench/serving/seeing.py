"""What it costs to be seen: the same service with all that tells of it on, and with all of it off, in turn.

On: a line for each call, a trace of each call, Ray's agents told, vLLM's names, `/metrics` read every 5 s as Prometheus
would, and the live page's numbers every second. Off: none of these, and nobody reads anything.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.bench.serving.client import completion, post
from tests.bench.serving.server import MeasuredServer
from tests.telemetry.collector import collecting

if TYPE_CHECKING:
    from tests.bench.serving.bench_serving import Bench

PERIOD_US = 20_000
STREAMS = (8, 32, 128)
NUM_CALLERS = 16
# So short that what is done once for each call weighs most.
TOKENS_PER_CALL = 8
# Seconds between two looks.
WATCHED = {"/metrics": 5.0, "/live": 1.0}
ON, OFF = "on", "off"
_OFF_ARGUMENTS = ("ingress.request_log=off", "metrics.to_ray=false")


@contextmanager
def servers(folder: Path, port: int) -> Iterator[dict[str, MeasuredServer]]:
    """One of each, and a collector of traces in this process."""
    started: dict[str, MeasuredServer] = {}
    with collecting() as collector:
        on = (f"ingress.traces.endpoint={collector.url}", "metrics.vllm_names=true")
        try:
            for number, (name, arguments) in enumerate(((ON, on), (OFF, _OFF_ARGUMENTS))):
                started[name] = MeasuredServer(folder / name, "ours", port + number, {}, arguments)
            yield started
        finally:
            for server in started.values():
                server.stop()


@asynccontextmanager
async def watched(server: MeasuredServer) -> AsyncIterator[None]:
    """Read what the service tells of itself, meanwhile; a page that is not there answers soon."""

    async def look(client: httpx.AsyncClient, path: str, period_s: float) -> None:
        while True:
            with suppress(httpx.TransportError):
                await client.get(path)
            await asyncio.sleep(period_s)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client:
        looks = [asyncio.create_task(look(client, path, period_s)) for path, period_s in WATCHED.items()]
        try:
            yield
        finally:
            for task in looks:
                task.cancel()
            await asyncio.gather(*looks, return_exceptions=True)


async def cost_of_calls(bench: "Bench", name: str) -> dict[str, Any]:
    """CPU per short call, and how long one takes."""
    server, seconds = bench.servers[name], list[float]()
    end_s = time.monotonic() + bench.window_s
    before = server.cpu_s()

    async def call() -> None:
        while time.monotonic() < end_s:
            begun_s = time.monotonic()
            connection = await post(server.port, completion(TOKENS_PER_CALL, PERIOD_US))
            await connection.reply.done.wait()
            seconds.append(time.monotonic() - begun_s)

    await asyncio.gather(*(call() for _ in range(NUM_CALLERS)))
    await asyncio.sleep(1.5)  # what is done once a call is over is part of it
    used = server.cpu_s() - before
    row = {
        "server": name,
        "calls": len(seconds),
        "cpu_us_per_call": sum(used.values()) / len(seconds) * 1e6,
        "call_s": statistics.median(seconds),
        "by_process_us": {role: round(s / len(seconds) * 1e6, 1) for role, s in used.items()},
    }
    print(f"{name}: {row['calls']} calls, {row['cpu_us_per_call']:.0f} us of CPU each", file=sys.stderr, flush=True)
    return row


async def measure(bench: "Bench") -> dict[str, Any]:
    """Both in turn, round after round."""
    report: dict[str, Any] = {"idle_share_of_a_core": [], "cost": [], "calls": []}
    for index in range(bench.rounds):
        report["idle_share_of_a_core"].append(await bench.idle())
        for name in (ON, OFF) if index % 2 else (OFF, ON):
            for num_streams in STREAMS:
                report["cost"].append(await _look(bench, name, bench.cost(name, num_streams)))
            report["calls"].append(await _look(bench, name, cost_of_calls(bench, name)))
    return report


async def _look(bench: "Bench", name: str, figure: Any) -> dict[str, Any]:
    if name == OFF:
        return await figure  # type: ignore[no-any-return]
    async with watched(bench.servers[name]):
        return await figure  # type: ignore[no-any-return]


def show(report: dict[str, Any]) -> None:
    """Print medians and their ratios."""
    readings = report["idle_share_of_a_core"]
    print("\nidle, share of a core: " + ", ".join(f"{n} {_median(readings, n):.1%}" for n in (ON, OFF)))
    print(f"\n{'':>24} {'on':>9} {'off':>9} {'ratio':>7}")
    for num_streams in STREAMS:
        rows = [row for row in report["cost"] if row["streams"] == num_streams]
        for key, unit in (("cpu_us_per_token", "us/token"), ("tokens_per_s", "tokens/s")):
            _show(f"{num_streams} streams, {unit}", rows, key, 1.0)
    _show("short calls, us/call", report["calls"], "cpu_us_per_call", 1.0)
    _show("short calls, ms", report["calls"], "call_s", 1e3)


def _show(what: str, rows: list[dict[str, Any]], key: str, scale: float) -> None:
    on, off = (_median([row for row in rows if row["server"] == name], key) * scale for name in (ON, OFF))
    print(f"{what:>24} {on:>9.1f} {off:>9.1f} {on / off:>7.3f}")


def _median(rows: list[dict[str, Any]], key: str) -> float:
    values: list[float] = [row[key] for row in rows]
    return statistics.median(values)
