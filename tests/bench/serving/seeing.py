"""What it costs to be seen: the same service with all that tells of it on, and with all of it off, in turn.

On: a trace of each call, Ray's agents told, vLLM's names, `/metrics` read every 5 s as Prometheus would, and the live
page's numbers every 2 s as the page reads them. Off: none of these, and nobody reads anything. Both write a line for
each call, as every service does unless told otherwise.

Each look at one is followed by the same look at the other, and such a pair has one ratio: what a machine does in a
minute that it did not do in the last one meets both alike. The figure is the median of many pairs, told with the middle
half of them. Windows are of 10 s, for as seldom are Ray's agents told.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.bench.progress import note
from tests.bench.serving.analysis import Paired, pair_up
from tests.bench.serving.client import completion, post
from tests.bench.serving.server import MeasuredServer
from tests.telemetry.collector import collecting

if TYPE_CHECKING:
    from tests.bench.serving.bench_serving import Bench

PERIOD_US = 20_000
STREAMS = (8, 32, 128)
ROUNDS, WINDOW_S = 8, 10.0
NUM_CALLERS = 16
# So short that what is done once for each call weighs most.
TOKENS_PER_CALL = 8
# Seconds between two looks.
WATCHED = {"/metrics": 5.0, "/live": 2.0}
ON, OFF = "on", "off"
_OFF_ARGUMENTS = ("metrics.to_ray=false",)


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
    """CPU per short call, and how long one takes.

    A caller pauses for up to a step of the engine before it calls again: else all of them fall into step with it, and a
    millisecond more makes calls a whole step longer, or not at all.
    """
    server, seconds, draw = bench.servers[name], list[float](), random.Random(1)
    end_s = time.monotonic() + bench.window_s
    before = server.cpu_s()

    async def call() -> None:
        while time.monotonic() < end_s:
            await asyncio.sleep(draw.uniform(0, PERIOD_US * 1e-6))
            begun_s = time.monotonic()
            connection = await post(server.port, completion(TOKENS_PER_CALL, PERIOD_US))
            await connection.reply.done.wait()
            seconds.append(time.monotonic() - begun_s)

    await asyncio.gather(*(call() for _ in range(NUM_CALLERS)))
    await asyncio.sleep(1.5)  # what is done once a call is over is part of it
    used = server.cpu_s() - before
    row = {
        "calls": len(seconds),
        "cpu_us_per_call": sum(used.values()) / len(seconds) * 1e6,
        "call_s": sum(seconds) / len(seconds),
        "by_process_us": {role: round(s / len(seconds) * 1e6, 1) for role, s in used.items()},
    }
    note(f"{name}: {row['calls']} calls, {row['cpu_us_per_call']:.0f} us of CPU each")
    return row


async def cost_of_idling(bench: "Bench", name: str) -> dict[str, Any]:
    """Share of a core, while nobody calls."""
    server, begun_s = bench.servers[name], time.monotonic()
    before = server.cpu_s()
    await asyncio.sleep(bench.window_s)
    used, seconds = server.cpu_s() - before, time.monotonic() - begun_s
    shares = {role: round(s / seconds * 100, 2) for role, s in used.items()}
    return {"share": sum(used.values()) / seconds, "by_process_percent": shares}


def looks(bench: "Bench") -> dict[str, Callable[[str], Awaitable[dict[str, Any]]]]:
    """What is looked at, of a server by its name."""
    streams = {f"{n} streams": partial(bench.cost, num_streams=n) for n in STREAMS}
    return {"idle": partial(cost_of_idling, bench), **streams, "short calls": partial(cost_of_calls, bench)}


async def measure(bench: "Bench") -> dict[str, Any]:
    """Pairs of looks, round after round; which server comes first changes with each."""
    await bench.idle()
    for name in (ON, OFF):
        await bench.cost(name, STREAMS[-1])  # what is done only once
    pairs: list[dict[str, Any]] = []
    for index in range(bench.rounds):
        note(f"round {index + 1} of {bench.rounds}")
        for number, (what, look) in enumerate(looks(bench).items()):
            order = (ON, OFF) if (index + number) % 2 else (OFF, ON)
            pairs.append({"what": what} | {name: await _look(bench, name, look(name)) for name in order})
    return {"pairs": pairs}


async def _look(bench: "Bench", name: str, figure: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    if name == OFF:
        return await figure
    async with watched(bench.servers[name]):
        return await figure


# What is shown of each look: a figure of it, its unit, and by how much it is multiplied for that.
_SHOWN: Mapping[str, tuple[tuple[str, str, float], ...]] = {
    "idle": (("share", "% of a core", 100.0),),
    **dict.fromkeys(
        (f"{n} streams" for n in STREAMS), (("cpu_us_per_token", "us/token", 1.0), ("tokens_per_s", "tokens/s", 1.0))
    ),
    "short calls": (("cpu_us_per_call", "us/call", 1.0), ("call_s", "ms", 1e3)),
}


def show(report: dict[str, Any]) -> None:
    """Print medians, those of the pairs' differences and ratios, and between which ratios the middle half lies."""
    print(f"\n{'':>26} {'on':>9} {'off':>9} {'more':>8} {'ratio':>7} {'middle half':>15} {'pairs':>6}")
    for what, figures in _SHOWN.items():
        taken = [pair for pair in report["pairs"] if pair["what"] == what]
        for key, unit, scale in figures:
            _show(f"{what}, {unit}", pair_up([(pair[ON][key] * scale, pair[OFF][key] * scale) for pair in taken]))


def _show(what: str, told: Paired) -> None:
    medians = f"{told.first:>9.1f} {told.second:>9.1f} {told.more:>8.2f} {told.ratio:>7.3f}"
    print(f"{what:>26} {medians} {told.low:>7.3f} - {told.high:.3f} {told.count:>6}")
