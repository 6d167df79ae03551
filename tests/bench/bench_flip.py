"""How soon a decode replica computes prompts for others, and decodes again; that no request notices.

Run: `make bench-flip`. Brings the graph up as `make serve` does, with one prefill replica and two of decode, twice.
First the roles are told here, as the planner tells them, under a steady load: timed from there until the engine has the
first prompt of somebody else, and until it awaits the first one of its own. Then the planner decides: the load goes
from chats to long prompts and to long answers, timed from the change until the role has changed. All requests are
greedy, and each prompt was answered before any role changed. Prints a table and, as its last line, one JSON object.
Ends with 1 if a request was lost or its tokens are others.

`--shape llama-8b` does it on GPUs, with a model of that shape and random weights. On two, the prefill engine shares a
GPU with a decode engine; on one, all three share it (100 GB of its memory). What an answer is generated beside changes
its rounding there, and many tokens of such a model all but tie; so tokens are compared while nothing else is drawn
(`alone`), and those under load only counted. `--shape tiny` tries all of it on a CPU.
"""

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
import torch

from app.local_process import RunFolder
from deployments.engine.stats import EngineStats
from deployments.roles import NAMESPACE
from load_tests.environment import describe
from tests.bench.chaos.cluster import join
from tests.bench.progress import note
from tests.bench.service import serving
from tests.bench.two_gpus.model import config_of, gpu_names, write_model

FOLDER = RunFolder(Path(".run/flip"))
MODEL = "smollm2-135m-instruct"
PATIENCE_S = 300.0
_POLL_S = 0.02
_DECODE = re.compile(r'^kvrelay_flipped{pool="\w+",replica="(\w+)"} ', re.MULTILINE)
_POOLS = {
    "min_remote_prefill_tokens": 64,
    "prefill.max_replicas": 1,
    "decode.min_replicas": 2,
    "decode.max_replicas": 2,
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
ON_CPU = {"prefill.num_cpus": 0.4, "decode.num_cpus": 0.4}
# Of one prefill engine and each of two decode engines, by the number of GPUs.
_SHARES = {1: (0.3, 0.35), 2: (0.4, 0.6)}
# Engines on one GPU: none may take what another has not taken yet. 12 GB are 90,000 tokens of Llama-8B.
ON_GPUS = {"engine.kv_cache_bytes": 12_000_000_000, "engine.max_model_len": 16_384}


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that are alike: clients, each of which asks again once it has its answer and has thought."""

    name: str
    num_clients: int
    prompt_tokens: int
    max_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Kinds:
    """What is asked of one model.

    Attributes:
        model: its name in the API.
        vocab_size: of its tokens.
        steady: while roles are told.
        chats: that keep nobody busy.
        prompts: that keep prefill busy.
        answers: that need all seats of decode.
    """

    model: str
    vocab_size: int
    steady: Kind = Kind("steady", 4, 200, 16)
    chats: Kind = Kind("chats", 1, 40, 4, think_s=1.0)
    prompts: Kind = Kind("prompts", 8, 600, 4)
    answers: Kind = Kind("answers", 40, 80, 64)


def kinds_on_gpus(model: str, vocab_size: int) -> Kinds:
    """Longer ones, for engines that are some ten times as fast."""
    return Kinds(
        model,
        vocab_size,
        Kind("steady", 4, 2000, 16),
        Kind("chats", 1, 300, 4, think_s=1.0),
        Kind("prompts", 8, 8000, 4),
        Kind("answers", 40, 300, 256),
    )


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
        num_alone: answers of which the prompt was computed by a decode replica, and nothing else was drawn beside them.
        num_other_alone: of these and of those that were drawn alone once it was back, answers with other tokens.
    """

    expected: dict[tuple[str, tuple[int, ...]], list[int]]
    num_requests: int = 0
    lost: list[str] = field(default_factory=list)
    num_other: int = 0
    num_alone: int = 0
    num_other_alone: int = 0


def prompts_of(kind: Kind, vocab_size: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(kind.prompt_tokens)
    return [
        tuple(map(int, rng.integers(vocab_size // 40, vocab_size, kind.prompt_tokens))) for _ in range(_NUM_PROMPTS)
    ]


class Load:
    """Sends requests of one kind to the service.

    Args:
        http: to it.
        kinds: that there are.
        tally: is told of each.
    """

    def __init__(self, http: httpx.AsyncClient, kinds: Kinds, tally: Tally) -> None:
        self._http, self.kinds, self.tally = http, kinds, tally
        self._num_sent = 0

    async def learn(self) -> None:
        """Ask each prompt once, of which the tokens are not known."""
        for kind in (self.kinds.steady, self.kinds.chats, self.kinds.prompts, self.kinds.answers):
            for prompt in prompts_of(kind, self.kinds.vocab_size):
                if (kind.name, prompt) not in self.tally.expected:
                    self.tally.expected[kind.name, prompt] = await self._ask(prompt, kind)

    @asynccontextmanager
    async def of(self, kind: Kind) -> AsyncIterator[None]:
        """Clients ask for as long as the context; each ends with its answer."""
        is_over = asyncio.Event()

        async def client(number: int) -> None:
            prompts = prompts_of(kind, self.kinds.vocab_size)
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

    async def get_tokens(self, number: int, *, beside_a_prompt: bool) -> bool:
        """Whether one prompt is answered as before; maybe while another engine computes a longer one, for one token."""
        steady, vocab_size = self.kinds.steady, self.kinds.vocab_size
        prompt, longer = (prompts_of(kind, vocab_size)[number % _NUM_PROMPTS] for kind in (steady, self.kinds.prompts))
        async with asyncio.TaskGroup() as tasks:
            if beside_a_prompt:
                tasks.create_task(self._ask(longer, replace(self.kinds.prompts, max_tokens=1)))
                await asyncio.sleep(_POLL_S)
            tokens = await self._ask(prompt, steady)
        self.tally.num_requests += 1 + beside_a_prompt
        return tokens == self.tally.expected[steady.name, prompt]

    async def _try(self, prompt: tuple[int, ...], kind: Kind) -> None:
        self.tally.num_requests += 1
        try:
            tokens = await self._ask(prompt, kind)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.tally.lost.append(repr(error))
            return
        self.tally.num_other += tokens != self.tally.expected[kind.name, prompt]

    async def _ask(self, prompt: tuple[int, ...], kind: Kind) -> list[int]:
        self._num_sent += 1
        fields = {
            "model": self.kinds.model,
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
    async with load.of(load.kinds.steady):
        for number in range(num_rounds):
            note(f"round {number + 1} of {num_rounds}")
            before = (await engines.until(lambda stats: stats[1].num_reserved > 0))[1].prompt_tokens
            there.append(await _timed(engines, True, partial(_is_given, before)))
            await engines.until(lambda stats: stats[1].num_reserved + stats[1].num_running == 0)
            back.append(await _timed(engines, False, lambda stats: stats[1].num_reserved > 0))
    await compare_alone(load, engines)
    return {"there_s": there, "back_s": back}


async def compare_alone(load: Load, engines: Engines) -> None:
    """Tokens of prompts that a flipped replica has computed, and of prompts once it is back; one after the other."""
    tally, longer = load.tally, load.kinds.prompts.prompt_tokens
    await engines.take_role(1, True)
    for number in range(2 * _NUM_PROMPTS):
        before = (await engines.until(lambda stats: True))[1].prompt_tokens
        is_equal = await load.get_tokens(number, beside_a_prompt=True)
        computed = (await engines.until(lambda stats: True))[1].prompt_tokens - before
        if 0 < computed < longer:  # this one, and not the longer one
            tally.num_alone += 1
            tally.num_other_alone += not is_equal
    await engines.take_role(1, False)
    for number in range(_NUM_PROMPTS):
        tally.num_other_alone += not await load.get_tokens(number, beside_a_prompt=False)


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
    async with load.of(load.kinds.chats):
        await asyncio.sleep(settle_s)
    note("long prompts, until it flips a replica")
    async with load.of(load.kinds.prompts):
        begun_s = time.monotonic()
        await engines.until(lambda stats: any(engine.is_flipped for engine in stats))
        there_s = time.monotonic() - begun_s
        await asyncio.sleep(PROMPTS_S)
    await engines.until(lambda stats: any(engine.is_flipped for engine in stats))  # else there is nothing to time
    note("long answers, until it flips that back")
    async with load.of(load.kinds.answers):
        begun_s = time.monotonic()
        await engines.until(lambda stats: not any(engine.is_flipped for engine in stats))
        back_s = time.monotonic() - begun_s
    return {"there_s": [there_s], "back_s": [back_s]}


async def measure(url: str, kinds: Kinds, tally: Tally, run: Callable[[Load, Engines], Any]) -> dict[str, list[float]]:
    """One service."""
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
        load = Load(http, kinds, tally)
        await load.learn()
        text = (await http.get("/metrics")).text
        kv = re.findall(r'^kvrelay_kv_blocks{pool="decode",replica="(\w+)"}', text, re.MULTILINE)
        engines = Engines(sorted(set(kv) & set(_DECODE.findall(text))))
        seconds: dict[str, list[float]] = await run(load, engines)
        return seconds


def model_of(shape: str | None) -> tuple[Kinds, dict[str, Any]]:
    """What is asked of which model, and what it needs of the application."""
    if shape is None:
        return Kinds(MODEL, 40_000), ON_CPU
    folder = FOLDER.path / shape
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, shape)
    settings, vocab_size = {"model": str(folder.resolve())}, config_of(shape).vocab_size
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        return Kinds(shape, vocab_size), settings | ON_CPU
    gpus = dict(zip(("prefill.num_gpus", "decode.num_gpus"), _SHARES.get(num_gpus, (1.0, 1.0)), strict=True))
    return kinds_on_gpus(shape, vocab_size), settings | ON_GPUS | gpus


HEAD = f"{'':>8}  {'there p50':>9}  {'max':>6}  {'back p50':>9}  {'max':>6}  requests  lost  other tokens  alone  other"


def row(name: str, seconds: dict[str, list[float]], tally: Tally) -> str:
    """A line of the table under `HEAD`."""
    there, back = seconds["there_s"], seconds["back_s"]
    return (
        f"{name:>8}  {np.median(there):7.2f} s  {max(there):4.2f} s  {np.median(back):7.2f} s  {max(back):4.2f} s"
        f"  {tally.num_requests:8}  {len(tally.lost):4}  {tally.num_other:12}  {tally.num_alone:5}"
        f"  {tally.num_other_alone:5}"
    )


def main() -> int:
    """Measure; see the module for what comes back."""
    parser = argparse.ArgumentParser(prog="make bench-flip ARGS=...")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", nargs="+", choices=["told", "planned"], default=["told", "planned"])
    parser.add_argument("--shape", help="of a model with random weights: llama-8b, on GPUs, or tiny")
    parser.add_argument("--port", type=int, default=8016)
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of the application")
    options = parser.parse_args()
    runs: dict[str, tuple[dict[str, Any], Callable[[Load, Engines], Any]]] = {
        "told": (TOLD, lambda load, engines: tell(load, engines, options.rounds)),
        "planned": (PLANNED, plan),
    }
    kinds, of_model = model_of(options.shape)
    results, is_good = {}, True
    expected: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    print(HEAD, flush=True)
    for name in options.runs:
        settings, run = runs[name]
        tally = Tally(expected)
        arguments = [f"{key}={value}" for key, value in (_POOLS | of_model | settings).items()]
        with serving(FOLDER, options.port, [*arguments, *options.arguments]):
            server = FOLDER.server()
            assert server is not None, "it answered a moment ago"
            join(server)
            try:
                seconds = asyncio.run(measure(server.url, kinds, tally, run))
            finally:
                ray.shutdown()
        print(row(name, seconds, tally), flush=True)
        results[name] = seconds | asdict(replace(tally, expected={})) | {"load_average": psutil.getloadavg()[0]}
        num_wrong = tally.num_other_alone + (0 if "decode.num_gpus" in of_model else tally.num_other)
        is_good = is_good and not tally.lost and not num_wrong and (tally.num_alone > 0 or name != "told")
    print(json.dumps({"about": describe(settings=_POOLS | of_model, gpus=gpu_names()), **results}))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
