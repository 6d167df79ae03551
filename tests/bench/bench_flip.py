"""How soon a decode replica computes prompts for others, and decodes again; that no request notices.

Run: `make bench-flip`. Brings the graph up as `make serve` does, with one prefill replica and two of decode, twice.
First the roles are told here, as the planner tells them, under a steady load: timed from there until the engine has the
first prompt of somebody else, and until it awaits the first one of its own. Then the planner decides: the load goes
from chats to long prompts and to long answers, timed from the change until the role has changed. All requests are
greedy, and each prompt was answered before any role changed. Prints a table and, as its last line, one JSON object.
Ends with 1 if a request was lost or its tokens are others.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray

from app.local_process import RunFolder
from deployments.engine.stats import EngineStats
from deployments.roles import NAMESPACE
from load_tests.environment import describe
from tests.bench.chaos.cluster import join
from tests.bench.progress import note
from tests.bench.service import serving

FOLDER = RunFolder(Path(".run/flip"))
MODEL = "smollm2-135m-instruct"
PATIENCE_S = 300.0
_POLL_S = 0.02
_DECODE = re.compile(r'^kvrelay_flipped{pool="\w+",replica="(\w+)"} ', re.MULTILINE)
_POOLS = {
    "min_remote_prefill_tokens": 64,
    "prefill.max_replicas": 1,
    "prefill.num_cpus": 0.4,
    "decode.min_replicas": 2,
    "decode.max_replicas": 2,
    "decode.num_cpus": 0.4,
    "decode.engine.max_num_seqs": 16,
    "ingress.max_ttft_s": 600,
    "engine.lease_s": 120,
    "engine.max_silence_s": 120,
    "planner.enabled": "true",
    "planner.flip": "true",
}
TOLD = {"planner.dry_run": "true"}
# An answer that keeps no more than half of an engine busy leaves the other replica idle, whatever shares the machine.
PLANNED = {"planner.hold_s": 15, "planner.start_s": 5, "planner.ttft_s": 2, "planner.itl_s": 5}


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that are alike: clients, each of which asks again once it has its answer and has thought."""

    name: str
    num_clients: int
    prompt_tokens: int
    max_tokens: int
    think_s: float = 0.0


STEADY = Kind("steady", 4, 200, 16)
CHATS = Kind("chats", 1, 40, 4, think_s=1.0)
PROMPTS = Kind("prompts", 8, 600, 4)
ANSWERS = Kind("answers", 40, 80, 64)
_NUM_PROMPTS = 6
# Of long prompts, after a role has changed.
PROMPTS_S = 15.0


@dataclass(slots=True)
class Tally:
    """What became of the requests.

    Attributes:
        expected: tokens by the kind and the prompt, as they were before any role changed.
        num_requests: that were answered or lost.
        lost: why, of each that was.
        num_other: answers with other tokens.
    """

    expected: dict[tuple[str, tuple[int, ...]], list[int]]
    num_requests: int = 0
    lost: list[str] = field(default_factory=list)
    num_other: int = 0


def prompts_of(kind: Kind) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(kind.prompt_tokens)
    return [tuple(map(int, rng.integers(1000, 40_000, kind.prompt_tokens))) for _ in range(_NUM_PROMPTS)]


class Load:
    """Sends requests of one kind to the service.

    Args:
        http: to it.
        tally: is told of each.
    """

    def __init__(self, http: httpx.AsyncClient, tally: Tally) -> None:
        self._http, self._tally = http, tally
        self._num_sent = 0

    async def learn(self, kinds: list[Kind]) -> None:
        """Ask each prompt once, of which the tokens are not known."""
        for kind in kinds:
            for prompt in prompts_of(kind):
                if (kind.name, prompt) not in self._tally.expected:
                    self._tally.expected[kind.name, prompt] = await self._ask(prompt, kind)

    @asynccontextmanager
    async def of(self, kind: Kind) -> AsyncIterator[None]:
        """Clients ask for as long as the context; each ends with its answer."""
        is_over = asyncio.Event()

        async def client(number: int) -> None:
            prompts = prompts_of(kind)
            while not is_over.is_set():
                await self._try(prompts[(number := number + 1) % len(prompts)], kind)
                with suppress(TimeoutError):
                    await asyncio.wait_for(is_over.wait(), kind.think_s + 1e-3)

        async with asyncio.TaskGroup() as clients:
            for number in range(kind.num_clients):
                clients.create_task(client(number))
            try:
                yield
            finally:
                is_over.set()

    async def _try(self, prompt: tuple[int, ...], kind: Kind) -> None:
        self._tally.num_requests += 1
        try:
            tokens = await self._ask(prompt, kind)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self._tally.lost.append(repr(error))
            return
        self._tally.num_other += tokens != self._tally.expected[kind.name, prompt]

    async def _ask(self, prompt: tuple[int, ...], kind: Kind) -> list[int]:
        self._num_sent += 1
        fields = {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": kind.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "cache_salt": str(self._num_sent),  # computed anew each time
        }
        answer = await self._http.post("/v1/completions", json=fields)
        answer.raise_for_status()
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens


class Engines:
    """The decode engines, asked past the service."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._actors: list[Any] = [ray.get_actor(name, namespace=NAMESPACE) for name in names]

    async def take_role(self, number: int, is_flipped: bool) -> None:
        await self._actors[number].take_role.remote(is_flipped)

    async def until(self, condition: Callable[[list[EngineStats]], bool]) -> list[EngineStats]:
        """What they said when it was true."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                stats = await asyncio.gather(*(actor.stats.remote() for actor in self._actors))
                if condition(stats):
                    return stats
                await asyncio.sleep(_POLL_S)


async def tell(load: Load, engines: Engines, num_rounds: int) -> dict[str, list[float]]:
    """Tell one engine its role, again and again; seconds until it does other work, there and back."""
    there, back = list[float](), list[float]()
    async with load.of(STEADY):
        for number in range(num_rounds):
            note(f"round {number + 1} of {num_rounds}")
            before = (await engines.until(lambda stats: stats[1].num_reserved > 0))[1].prompt_tokens
            there.append(await _timed(engines, True, partial(_is_given, before)))
            await engines.until(lambda stats: stats[1].num_reserved + stats[1].num_running == 0)
            back.append(await _timed(engines, False, lambda stats: stats[1].num_reserved > 0))
    return {"there_s": there, "back_s": back}


def _is_given(before: int, stats: list[EngineStats]) -> bool:
    """It has a prompt to compute, or has: all are long enough to be computed elsewhere, so it is somebody else's."""
    engine = stats[1]
    return engine.num_queued_prompt_tokens > engine.num_remote_prompt_tokens or engine.prompt_tokens > before


async def _timed(engines: Engines, is_flipped: bool, condition: Callable[[list[EngineStats]], bool]) -> float:
    told_s = time.monotonic()
    await engines.take_role(1, is_flipped)
    await engines.until(condition)
    return time.monotonic() - told_s


async def plan(load: Load, engines: Engines) -> dict[str, list[float]]:
    """Have the planner decide; seconds from the change of the load to that of the role."""
    settle_s = 3.0 * float(PLANNED["planner.hold_s"])
    note("chats, until the planner has settled")
    async with load.of(CHATS):
        await asyncio.sleep(settle_s)
    note("long prompts, until it flips a replica")
    async with load.of(PROMPTS):
        begun_s = time.monotonic()
        await engines.until(lambda stats: any(engine.is_flipped for engine in stats))
        there_s = time.monotonic() - begun_s
        await asyncio.sleep(PROMPTS_S)
    await engines.until(lambda stats: any(engine.is_flipped for engine in stats))  # else there is nothing to time
    note("long answers, until it flips that back")
    async with load.of(ANSWERS):
        begun_s = time.monotonic()
        await engines.until(lambda stats: not any(engine.is_flipped for engine in stats))
        back_s = time.monotonic() - begun_s
    return {"there_s": [there_s], "back_s": [back_s]}


async def measure(url: str, tally: Tally, run: Callable[[Load, Engines], Any]) -> dict[str, list[float]]:
    """One service."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
        load = Load(http, tally)
        await load.learn([STEADY, CHATS, PROMPTS, ANSWERS])
        text = (await http.get("/metrics")).text
        kv = re.findall(r'^kvrelay_kv_blocks{pool="decode",replica="(\w+)"}', text, re.MULTILINE)
        engines = Engines(sorted(set(kv) & set(_DECODE.findall(text))))
        seconds: dict[str, list[float]] = await run(load, engines)
        return seconds


def main() -> int:
    """Measure; see the module for what comes back."""
    parser = argparse.ArgumentParser(prog="make bench-flip ARGS=...")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", nargs="+", choices=["told", "planned"], default=["told", "planned"])
    parser.add_argument("--port", type=int, default=8016)
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of the application")
    options = parser.parse_args()
    runs: dict[str, tuple[dict[str, Any], Callable[[Load, Engines], Any]]] = {
        "told": (TOLD, lambda load, engines: tell(load, engines, options.rounds)),
        "planned": (PLANNED, plan),
    }
    results, is_good = {}, True
    expected: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    print(f"{'':>8}  {'there p50':>9}  {'max':>6}  {'back p50':>9}  {'max':>6}  requests  lost  other tokens")
    for name in options.runs:
        settings, run = runs[name]
        tally = Tally(expected)
        arguments = [f"{key}={value}" for key, value in (_POOLS | settings).items()]
        with serving(FOLDER, options.port, [*arguments, *options.arguments]):
            server = FOLDER.server()
            assert server is not None, "it answered a moment ago"
            join(server)
            try:
                seconds = asyncio.run(measure(server.url, tally, run))
            finally:
                ray.shutdown()
        there, back = seconds["there_s"], seconds["back_s"]
        print(
            f"{name:>8}  {np.median(there):7.2f} s  {max(there):4.2f} s  {np.median(back):7.2f} s  {max(back):4.2f} s"
            f"  {tally.num_requests:8}  {len(tally.lost):4}  {tally.num_other:12}"
        )
        results[name] = seconds | {
            "num_requests": tally.num_requests, "lost": tally.lost, "num_other": tally.num_other,
            "load_average": psutil.getloadavg()[0],
        }  # fmt: skip
        is_good = is_good and not tally.lost and not tally.num_other
    print(json.dumps({"about": describe(settings=_POOLS), **results}))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
