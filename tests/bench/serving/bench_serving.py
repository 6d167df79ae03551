"""What the serving layer costs per token and what it adds to the latency, beside the ordinary way through Ray Serve.

Run: `make bench-serving`; `--quick` for one short round, `--flags` for the gain of each setting of Ray Serve instead,
`--seeing` for what metrics, traces and the live page cost.
Prints tables and, as its last line, one JSON object with every raw number.

Both servers run all the time, each on a Ray of its own, and take turns. The engine keeps time and has no model; all the
rest is what `make serve` starts. CPU is that of all processes of a server, Ray's own among them.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import uvloop

from deployments.engine.model.files import BUNDLED_MODEL
from deployments.engine.model.resolve import resolve_model
from tests.bench.progress import note
from tests.bench.serving import seeing
from tests.bench.serving.analysis import (
    added_gaps,
    largest_gap_between,
    request_id_of,
    token_times,
)
from tests.bench.serving.client import Connection, completion, post, post_and_never_read
from tests.bench.serving.paced import TokenLoop
from tests.bench.serving.report import OFFERED_TOKENS_PER_S, STREAMS, show, show_flags
from tests.bench.serving.server import DEFAULT_FLAGS, MeasuredServer
from tests.bench.serving.traces import read_trace, wait_for_traces

PERIOD_US = 20_000
_LONG_PROMPT = "The quick brown fox jumps over the lazy dog, and it did so again and again. " * 5_600  # 100,801 tokens
_LONG_CHAT = completion(1, PERIOD_US, messages=[{"role": "user", "content": _LONG_PROMPT}])
del _LONG_CHAT["prompt"]
_LONG_REQUESTS = (
    (completion(1, PERIOD_US, prompt=_LONG_PROMPT), "/v1/completions"),
    (_LONG_CHAT, "/v1/chat/completions"),
)
MAX_UNREAD_TOKENS = 2_000
IDLE_WINDOW_S = 8.0
# With more the ordinary way falls far behind and needs minutes to recover, so that is looked at once, at the end.
MAX_ORDINARY_STREAMS = 32
_BUSY_SHARE = 1.5


class Bench:
    """The servers and how long to look at them.

    Args:
        servers: by name.
        rounds: how often each figure is taken.
        window_s: length of each look.
    """

    def __init__(self, servers: dict[str, MeasuredServer], rounds: int, window_s: float) -> None:
        self.servers = servers
        self.rounds = rounds
        self.window_s = window_s
        self.loop = TokenLoop.load(resolve_model(BUNDLED_MODEL))
        self.idle_share: dict[str, float] = {}

    async def idle(self) -> dict[str, float]:
        """Share of a core that each server uses while nobody asks anything."""
        for name, server in self.servers.items():
            used = await self._cpu_of(server, IDLE_WINDOW_S)
            self.idle_share[name] = sum(used.values()) / IDLE_WINDOW_S
        return dict(self.idle_share)

    async def cost(self, name: str, num_streams: int, period_us: int = PERIOD_US) -> dict[str, Any]:
        """CPU per token of one server with so many streams."""
        server = self.servers[name]
        connections = await self._open(server, num_streams, period_us, warm_s=2.0)
        cpu, own, start_s = server.cpu_s(), _own_cpu_s(), time.monotonic()
        await asyncio.sleep(self.window_s)
        used, end_s = server.cpu_s() - cpu, time.monotonic()
        own = _own_cpu_s() - own
        await self._close(server, connections)
        times = [token_times(connection.reply, self.loop) for connection in connections]
        num_tokens = sum(start_s <= at_s < end_s for stream in times for at_s in stream)
        num_events = sum(c.reply.num_events_between(start_s, end_s) for c in connections)
        row = {
            "server": name,
            "streams": num_streams,
            "period_us": period_us,
            "tokens_per_s": num_tokens / (end_s - start_s),
            "tokens_per_event": num_tokens / max(1, num_events),
            "cpu_us_per_token": sum(used.values()) / num_tokens * 1e6,
            "above_idle_us_per_token": (sum(used.values()) / (end_s - start_s) - self.idle_share.get(name, 0.0))
            * (end_s - start_s) / num_tokens * 1e6,
            "client_us_per_token": own / num_tokens * 1e6,
            "by_process_us": {role: round(seconds / num_tokens * 1e6, 1) for role, seconds in used.items()},
        }  # fmt: skip
        note(
            f"{name}, {num_streams} streams: {row['tokens_per_s']:.0f} tokens/s, {row['cpu_us_per_token']:.0f} us per "
            f"token {row['by_process_us']}"
        )
        return row

    async def added_first_token(self, name: str, num_requests: int) -> list[float]:
        """Seconds from the engine's first token to its arrival, one idle request at a time."""
        server = self.servers[name]
        arrivals = {}
        for _ in range(num_requests):
            connection = await post(server.port, completion(3, PERIOD_US))
            await connection.reply.done.wait()
            arrivals[request_id_of(connection.reply)] = token_times(connection.reply, self.loop)[0]
        trace = await wait_for_traces(server.trace, arrivals)
        return [at_s - trace[request_id][0] for request_id, at_s in arrivals.items()]

    async def added_itl(self, name: str, num_streams: int) -> list[float]:
        """Seconds by which each gap between tokens is longer at the client than at the engine."""
        server = self.servers[name]
        connections = await self._open(server, num_streams, PERIOD_US, warm_s=1.0)
        await asyncio.sleep(self.window_s)
        await self._close(server, connections)
        replies = {request_id_of(connection.reply): connection.reply for connection in connections}
        trace = await wait_for_traces(server.trace, replies)
        added: list[float] = []
        for request_id, reply in replies.items():
            added += added_gaps(token_times(reply, self.loop), trace[request_id])
        return added

    async def long_prompt(self, name: str, num_posts: int) -> list[dict[str, float]]:
        """The longest gap of any of 32 streams while a prompt of 100,000 tokens is taken in, and just before."""
        server = self.servers[name]
        span_s = 3.0
        connections = await self._open(server, 32, PERIOD_US, warm_s=1.0)
        marks: list[tuple[float, float, float, float]] = []
        for _ in range(num_posts):
            before_s = time.monotonic()
            await asyncio.sleep(span_s)
            posted_s = time.monotonic()
            answer = await post(server.port, *_LONG_REQUESTS[len(marks) % 2])
            await answer.reply.done.wait()
            answered_s = time.monotonic()
            await asyncio.sleep(max(0.0, span_s - (answered_s - posted_s)))
            assert answer.reply.events()[-1][1]["choices"][0]["finish_reason"] == "length", "it was answered"
            marks.append((before_s, posted_s, time.monotonic(), answered_s - posted_s))
        await self._close(server, connections)
        times = [token_times(connection.reply, self.loop) for connection in connections]
        rows = []
        for before_s, posted_s, end_s, answer_s in marks:
            before = [largest_gap_between(stream, before_s, posted_s) for stream in times]
            during = [largest_gap_between(stream, posted_s, end_s) for stream in times]
            rows.append(
                {
                    "before_s": max(before),
                    "during_s": max(during),
                    "grown_s": max(d - b for d, b in zip(during, before, strict=True)),
                    "answer_s": answer_s,
                }
            )
            note(f"long prompt: {rows[-1]}")
        return rows

    async def stalled_client(self, name: str) -> dict[str, Any]:
        """One client stops reading while 8 others read: when is it dropped, and what does that cost the others?"""
        server = self.servers[name]
        period_us = 500
        rss = server.rss_bytes("ingress")
        connections = await self._open(server, 8, period_us, warm_s=1.0)
        start_s = time.monotonic()
        deaf = post_and_never_read(server.port, completion(100_000, period_us, stream_options=_WORDY))
        peak = rss
        while time.monotonic() - start_s < 60:
            await asyncio.sleep(0.25)
            peak = max(peak, server.rss_bytes("ingress"))
            # Only requests that end are traced, and the others go on.
            if dropped := [times for times in read_trace(server.trace).values() if times and times[0] > start_s]:
                break
        else:
            raise AssertionError("the client that does not read was never dropped")
        end_s = time.monotonic()
        await self._close(server, connections)
        deaf.close()
        (deaf_times,) = dropped
        times = [token_times(connection.reply, self.loop) for connection in connections]
        row = {
            "dropped_after_s": deaf_times[-1] - start_s,
            "tokens_until_dropped": len(deaf_times),
            "ingress_grew_by_bytes": peak - rss,
            "longest_gap_of_others_s": max(largest_gap_between(stream, start_s, end_s) for stream in times),
            "longest_gap_before_s": max(largest_gap_between(stream, start_s - 1, start_s) for stream in times),
            "tokens_per_s_of_others": sum(start_s <= at < end_s for stream in times for at in stream)
            / (end_s - start_s),
        }
        note(f"stalled client: {row}")
        return row

    async def _open(self, server: MeasuredServer, num_streams: int, period_us: int, warm_s: float) -> list[Connection]:
        body = completion(150_000, period_us)
        connections = [await post(server.port, body) for _ in range(num_streams)]
        while not all(connection.reply.pieces for connection in connections):
            assert not any(connection.reply.done.is_set() for connection in connections), connections[0].reply.body
            await asyncio.sleep(0.05)
        await asyncio.sleep(warm_s)
        return connections

    async def _close(self, server: MeasuredServer, connections: list[Connection]) -> None:
        """End the streams and wait until the server has got over it."""
        for connection in connections:
            connection.transport.abort()
        idle_share = self.idle_share.get(server.name, 0.2)
        for _ in range(120):
            if sum((await self._cpu_of(server, 0.5)).values()) / 0.5 < idle_share * _BUSY_SHARE + 0.05:
                return
        note(f"{server.name} is still busy a minute after its clients left")

    async def _cpu_of(self, server: MeasuredServer, seconds: float) -> Counter[str]:
        before = server.cpu_s()
        await asyncio.sleep(seconds)
        return server.cpu_s() - before


# Events of more bytes, so that the sockets between fill up sooner.
_WORDY = {"include_usage": True, "continuous_usage_stats": True}


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(bench: Bench, num_first_tokens: int) -> dict[str, Any]:
    """Everything but the settings."""
    report: dict[str, Any] = {"idle_share_of_a_core": [], "cost": [], "flat_out": []}
    for index in range(bench.rounds):
        note(f"round {index + 1} of {bench.rounds}")
        report["idle_share_of_a_core"].append(await bench.idle())
        for name in bench.servers:
            for num_streams in STREAMS:
                if name == "ours" or num_streams <= MAX_ORDINARY_STREAMS:
                    report["cost"].append(await bench.cost(name, num_streams))
    for _ in range(bench.rounds):
        for rate in OFFERED_TOKENS_PER_S:
            row = await bench.cost("ours", 64, period_us=round(64 / rate * 1e6))
            report["flat_out"].append(row | {"offered_tokens_per_s": rate})
    note("latency")
    report["added_first_token_s"] = {name: [] for name in bench.servers}
    report["added_itl_s"] = {name: [] for name in bench.servers}
    for _ in range(bench.rounds):
        for name in bench.servers:
            report["added_first_token_s"][name] += await bench.added_first_token(name, num_first_tokens)
            report["added_itl_s"][name] += await bench.added_itl(name, 32)
    report["long_prompt"] = await bench.long_prompt("ours", num_posts=bench.rounds)
    report["stalled_client"] = await bench.stalled_client("ours")
    for num_streams in STREAMS:
        if num_streams > MAX_ORDINARY_STREAMS:
            report["cost"].append(await bench.cost("ordinary", num_streams))
    return report


# Each leaves one setting of app/serve.env as Ray Serve has it.
FLAG_SETS: dict[str, dict[str, str]] = {
    "all of app/serve.env": {},
    "without HAProxy": {"RAY_SERVE_ENABLE_HA_PROXY": "0"},
    "without gRPC": {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "0"},
    "user code in a thread": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1"},
    "router in a thread": {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"},
    "control loop of 0.1 s": {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1"},
    "HAProxy with Nagle": {"RAY_SERVE_HAPROXY_TCP_NODELAY": "0"},
    "none of it": DEFAULT_FLAGS | {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1"},
    "all again": {},
}


async def measure_flags(folder: Path, port: int, rounds: int, window_s: float) -> list[dict[str, Any]]:
    """The same 32 streams under each set of settings, one server after the other."""
    rows = []
    for index, (name, flags) in enumerate(FLAG_SETS.items()):
        server = MeasuredServer(folder / f"flags-{index}", "ours", port, flags)
        try:
            bench = Bench({"ours": server}, rounds, window_s)
            await bench.idle()
            costs = [await bench.cost("ours", 32) for _ in range(rounds)]
            first = await bench.added_first_token("ours", 50)
            itl = await bench.added_itl("ours", 32)
        finally:
            server.stop()
        rows.append({"settings": name, "idle": bench.idle_share["ours"], "cost": costs, "first_s": first, "itl_s": itl})
    return rows


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start what is measured, measure it, and stop it."""
    usual = (seeing.ROUNDS, seeing.WINDOW_S) if options.seeing else (3, 5.0)
    rounds, window_s = (1, 2.0) if options.quick else (options.rounds or usual[0], usual[1])
    if options.flags:
        rows = uvloop.run(measure_flags(folder, options.port, rounds, window_s))
        show_flags(rows)
        return {"flags": rows}
    if options.seeing:
        with seeing.servers(folder, options.port) as pair:
            report = uvloop.run(seeing.measure(Bench(pair, rounds, window_s)))
        seeing.show(report)
        return {"seeing": report}
    servers: dict[str, MeasuredServer] = {}
    starts: dict[str, Callable[[], MeasuredServer]] = {
        "ours": lambda: MeasuredServer(
            folder / "ours", "ours", options.port, {}, (f"ingress.max_unread_tokens={MAX_UNREAD_TOKENS}",)
        ),
        "ordinary": lambda: MeasuredServer(folder / "ordinary", "ordinary", options.port + 1, DEFAULT_FLAGS),
    }
    try:
        for name, start in starts.items():
            servers[name] = start()
        report = uvloop.run(measure(Bench(servers, rounds, window_s), 20 if options.quick else 100))
    finally:
        for server in servers.values():
            server.stop()
    show(report)
    return report


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, help=f"how often each figure is taken (default: 3; with --seeing {seeing.ROUNDS})"
    )
    parser.add_argument("--quick", action="store_true", help="one round of short looks")
    parser.add_argument("--flags", action="store_true", help="the gain of each setting of app/serve.env")
    parser.add_argument("--seeing", action="store_true", help="what it costs that the service tells of itself")
    parser.add_argument("--port", type=int, default=8130, help="first of two ports (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the servers then, too
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        report = run(options, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"ray": ray.__version__, "python": platform.python_version()}
    print(json.dumps({"commit": commit, "cores": os.cpu_count(), "versions": versions} | report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
