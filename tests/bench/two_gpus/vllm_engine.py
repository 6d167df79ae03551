"""vLLM engines, one per GPU, under the schedules that the service is measured with: `plays.py` writes them.

    python3 tests/bench/two_gpus/vllm_engine.py PLAY.json ... --model FOLDER --budgets 512,2048 --out FILE.json

Run by the Python that has vLLM, whose torch is another than this project's: the file stands alone and imports nothing
of the project. Each engine is an `AsyncLLM` in a process of its own, with nothing between it and the schedule: no HTTP,
no text. Sessions go to the engines round robin, class by class, in order of arrival, and stay there. FILE.json gets the
samples of each play in the form of `load_tests.samples`, and is written anew after each.

`--together` starts the engines of all budgets at once, each with `--kv-gib` of KV, since none can measure what memory
is left beside others that start; one budget is played at a time, while the others are idle. `--engine echo` tries all
of it without vLLM.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

# Between the word to begin and the first request: both processes must have heard it.
LEAD_S = 0.5


@dataclass(frozen=True)
class Settings:
    """Of one engine."""

    model: str
    budget: int
    kv_bytes: int | None
    max_num_seqs: int
    max_model_len: int


class Engine(Protocol):
    """What can be played to."""

    def generate(self, request_id: str, prompt: list[int], num_tokens: int) -> AsyncIterator[int]:
        """Continue a prompt greedily by exactly so many tokens; yields how many came, each time some came."""
        ...


class VllmEngine:
    """vLLM with its defaults, prefix caching included, but for `Settings`."""

    def __init__(self, settings: Settings) -> None:
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        self._params = SamplingParams
        self._deltas = RequestOutputKind.DELTA
        arguments = AsyncEngineArgs(
            model=settings.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            generation_config="vllm",
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.budget,
            kv_cache_memory_bytes=settings.kv_bytes,
            # Only asked of the GPU before it loads, where the KV's size is given.
            gpu_memory_utilization=0.9 if settings.kv_bytes is None else 0.05,
            disable_log_stats=True,
            seed=0,
        )
        self._engine = AsyncLLM.from_engine_args(arguments)

    async def generate(self, request_id: str, prompt: list[int], num_tokens: int) -> AsyncIterator[int]:
        params = self._params(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=self._deltas
        )
        async for output in self._engine.generate({"prompt_token_ids": prompt}, params, request_id):
            yield len(output.outputs[0].token_ids)


class EchoEngine:
    """A token per turn of the event loop, to try the rest with."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def generate(self, request_id: str, prompt: list[int], num_tokens: int) -> AsyncIterator[int]:
        if len(prompt) + num_tokens > self._settings.max_model_len:
            raise ValueError(f"{request_id} is too long")
        for _ in range(num_tokens):
            await asyncio.sleep(0)
            yield 1


ENGINES: dict[str, Callable[[Settings], Engine]] = {"vllm": VllmEngine, "echo": EchoEngine}


@dataclass
class Heard:
    """What came of one request; times are monotonic.

    Attributes:
        request: as it is in the play's file.
        sent_s: when.
        arrivals: time and number of tokens, each time some came.
        end_s: when all was there; None: it never was.
        error: what it failed with.
    """

    request: dict[str, Any]
    sent_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end_s: float | None = None
    error: str | None = None

    def sample(self, start_s: float) -> dict[str, Any]:
        """In the form of `load_tests.samples.Sample`."""
        times = [at for at, _ in self.arrivals]
        num_tokens = sum(count for _, count in self.arrivals)
        error = self.error
        if error is None and self.end_s is None:
            error = "unfinished"
        elif error is None and num_tokens != self.request["output_tokens"]:
            error = "wrong number of tokens"
        return {
            "request_class": self.request["request_class"],
            "session": self.request["session"],
            "turn": self.request["turn"],
            "planned_s": self.request["at_s"],
            "sent_s": self.sent_s - start_s,
            "ttft_s": times[0] - self.sent_s if times else None,
            "gaps_s": [later - earlier for earlier, later in pairwise(times)],
            "end_s": None if self.end_s is None else self.end_s - start_s,
            "prompt_tokens": len(self.request["prompt"]),
            "output_tokens": num_tokens,
            "error": error,
        }


@dataclass
class Player:
    """One play, or a part of it, on one engine.

    Args:
        engine: to play to.
        start_s: monotonic time that the play's times count from.
        end_s: nothing is sent later, in the play's time.
        drain_s: how long answers are awaited after that.
    """

    engine: Engine
    start_s: float
    end_s: float
    drain_s: float
    heard: list[Heard] = field(default_factory=list)

    async def play(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send all; every request that was sent, as a sample."""
        sessions: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for request in requests:
            sessions[request["session"]].append(request)
        tasks = [asyncio.create_task(self._play_session(turns)) for turns in sessions.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=self.start_s + self.end_s + self.drain_s - time.monotonic())
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return [one.sample(self.start_s) for one in self.heard]

    async def _play_session(self, turns: list[dict[str, Any]]) -> None:
        for request in turns:
            due_s = None if request["at_s"] is None else self.start_s + request["at_s"] - time.monotonic()
            await asyncio.sleep(max(0.0, request["delay_s"] if due_s is None else due_s))
            if time.monotonic() - self.start_s >= self.end_s:
                return
            await self._send(request)

    async def _send(self, request: dict[str, Any]) -> None:
        heard = Heard(request, time.monotonic())
        self.heard.append(heard)
        name = f"{request['session']}-{request['turn']}-{len(self.heard)}-{self.start_s}"
        try:
            async for count in self.engine.generate(name, request["prompt"], request["output_tokens"]):
                if count:
                    heard.arrivals.append((time.monotonic(), count))
        except Exception as error:
            heard.error = type(error).__name__
        heard.end_s = time.monotonic()


def share_of(requests: list[dict[str, Any]], index: int, count: int) -> list[dict[str, Any]]:
    """The requests of one of `count` engines: every so many sessions of each class, in order of arrival."""
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for request in requests:
        kinds[request["request_class"]].setdefault(request["session"], request["at_s"] or 0.0)
    mine = {name for sessions in kinds.values() for name in sorted(sessions, key=sessions.__getitem__)[index::count]}
    return [request for request in requests if request["session"] in mine]


async def work(settings: Settings, engine_name: str, say: Any) -> None:
    """One engine: a line in for each play, a line out when it is loaded and when it is over."""
    begun = time.monotonic()
    engine = ENGINES[engine_name](settings)
    # The first request may still compile something.
    await Player(engine, time.monotonic(), 1.0, 300.0).play([_first_request()])
    say({"started_s": time.monotonic() - begun})
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        play = await asyncio.to_thread(_read, order["play"])
        requests = share_of(play["requests"], order["index"], order["count"])
        say({"loaded": len(requests)})
        start_s = json.loads(await asyncio.to_thread(sys.stdin.readline))["start_s"]
        cpu_s = _cpu_s()
        player = Player(engine, start_s, play["warmup_s"] + play["duration_s"], play["drain_s"])
        samples = await player.play(requests)
        cpu = (_cpu_s() - cpu_s) / (time.monotonic() - start_s)
        await asyncio.to_thread(_write, order["out"], {"samples": samples, "cpu": cpu})
        say({"played": len(samples)})


def _read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def _write(path: str | Path, what: Any) -> None:
    Path(path).write_text(json.dumps(what))


def _first_request() -> dict[str, Any]:
    prompt = list(range(100, 356))
    request = {"request_class": "first", "session": "first", "turn": 0, "at_s": 0.0, "delay_s": 0.0}
    return request | {"prompt": prompt, "output_tokens": 8}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Worker:
    """A process with one engine on one GPU, on the side of whoever has started it."""

    def __init__(self, settings: Settings, gpu: int, engine_name: str, log: Path) -> None:
        cache = os.environ.get("VLLM_CACHE_ROOT", os.path.expanduser("~/.cache/vllm"))
        command = [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(asdict(settings))]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--engine", engine_name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                # A cache each: engines that start at once would compile into the same files.
                env=os.environ
                | {"CUDA_VISIBLE_DEVICES": str(gpu), "VLLM_CACHE_ROOT": f"{cache}/{settings.budget}-{gpu}"},
                start_new_session=True,
            )
        self._log = log

    def tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"an engine ended, see {self._log}:\n{last}")
        said: dict[str, Any] = json.loads(line)
        return said

    def kill(self) -> None:
        """It and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start(budgets: list[int], options: argparse.Namespace) -> dict[int, list[Worker]]:
    """Engines of some budgets, one per GPU and budget; they are loading."""
    return {
        budget: [
            Worker(
                Settings(
                    options.model,
                    budget,
                    int(options.kv_gib * 2**30) if options.together else None,
                    options.max_num_seqs,
                    options.max_model_len,
                ),
                gpu,
                options.engine,
                options.out.with_name(f"vllm-{budget}-{gpu}.log"),
            )
            for gpu in range(options.num_gpus)
        ]
        for budget in budgets
    }


def play_on(workers: list[Worker], path: str, deployment: str, out: Path) -> dict[str, Any]:
    """One play on the engines of one budget; a run in the form of `load_tests.samples.Run`."""
    parts = [out.with_name(f"part-{index}.json") for index in range(len(workers))]
    for index, worker in enumerate(workers):
        worker.tell({"play": os.path.abspath(path), "index": index, "count": len(workers), "out": str(parts[index])})
    for worker in workers:
        worker.hear()
    play = _read(path)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    start_s = time.monotonic() + LEAD_S  # one clock for all processes of a machine
    for worker in workers:
        worker.tell({"start_s": start_s})
    for worker in workers:
        worker.hear()
    found = [_read(part) for part in parts]
    cpu = {f"engine {index}": one["cpu"] for index, one in enumerate(found)}
    return {
        "scenario": play["name"],
        "deployment": deployment,
        "url": "",
        "load": 1.0,
        "round": play["round"],
        "started_at": started_at,
        "warmup_s": play["warmup_s"],
        "duration_s": play["duration_s"],
        "samples": [sample for one in found for sample in one["samples"]],
        "generator": {"lag_s": {}, "cpu": cpu, "problems": []},
        "server": {},
    }


def play_all(options: argparse.Namespace) -> None:
    """Every play at every budget; raises what an engine died of."""
    runs: list[dict[str, Any]] = []
    started_s: dict[str, float] = {}
    groups = [options.budgets] if options.together else [[budget] for budget in options.budgets]
    for budgets in groups:
        begun = time.monotonic()
        engines = start(budgets, options)
        workers = [worker for own in engines.values() for worker in own]
        try:
            for worker in workers:
                worker.hear()
            for budget in budgets:
                started_s[f"vLLM, {budget}"] = time.monotonic() - begun
            print(f"vLLM, {budgets}: up after {time.monotonic() - begun:.0f} s", flush=True)
            for path in options.plays:
                for budget in budgets:
                    name = f"vLLM, {budget}"
                    runs.append(play_on(engines[budget], path, name, options.out))
                    about = {"started_s": started_s, "started together": len(workers)}
                    _write(options.out, {"about": about, "runs": runs})
                    print(f"{name}: {runs[-1]['scenario']}, {len(runs[-1]['samples'])} requests", flush=True)
        finally:
            for worker in workers:
                worker.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plays", nargs="*", help="files of `plays.py`, played in this order")
    parser.add_argument("--model", help="folder of the model, as the service has it")
    parser.add_argument("--budgets", type=lambda text: [int(one) for one in text.split(",")], default=[512, 2048])
    parser.add_argument("--together", action="store_true", help="see above; start-up is then that of all of them")
    parser.add_argument("--kv-gib", type=float, default=12.0, help="of each engine with --together")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("vllm.json"))
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _be_worker(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that engines end with this
    play_all(options)
    return 0


def _be_worker(options: argparse.Namespace) -> int:
    # vLLM writes its log to stdout as well.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: dict[str, Any]) -> None:
        pipe.write(json.dumps(what) + "\n")
        pipe.flush()

    asyncio.run(work(Settings(**json.loads(options.worker)), options.engine, say))
    return 0


if __name__ == "__main__":
    sys.exit(main())
