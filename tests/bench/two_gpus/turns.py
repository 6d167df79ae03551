"""One way after the other to use the same engines, brought up as `make serve` does, and what is asked of each."""

import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.local_process import RunFolder
from tests.bench.interference.pinned import engines
from tests.bench.service import serving
from tests.bench.two_gpus.recorded import APP as RECORDED
from tests.bench.two_gpus.recorded import FOLDER as TIMELINES

PORT = 8012
FOLDER = RunFolder(Path(".run/two-gpus"))
SPLIT = "disaggregated"
PROBE_TOKENS = 32
RESTART_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Turn:
    """One way to use the engines: `disaggregated`, `disaggregated, NCCL`, or `colocated, BUDGET`.

    Attributes:
        name: of the three.
        num_engines: half of them prefill, where the pools are split; then it is even.
    """

    name: str
    num_engines: int = 2

    @property
    def is_split(self) -> bool:
        return self.name.startswith(SPLIT)

    def arguments(self, steps: int) -> list[str]:
        """Of the application; `steps`: token budget of the prefill engine."""
        if not self.is_split:
            budget = self.name.removeprefix("colocated, ")
            return ["mode=colocated", *_fixed("decode", self.num_engines), f"engine.max_num_batched_tokens={budget}"]
        replicas = [argument for pool in ("prefill", "decode") for argument in _fixed(pool, self.num_engines // 2)]
        sent = [] if self.name == SPLIT else ["engine.share_kv=false"]
        # Every prompt goes to the prefill engine: a decode step with a prompt in it is no CUDA graph.
        return ["min_remote_prefill_tokens=1", f"engine.max_num_batched_tokens={steps}", *replicas, *sent]


def _fixed(pool: str, count: int) -> list[str]:
    return [f"{pool}.min_replicas={count}", f"{pool}.max_replicas={count}"]


class Service:
    """The service that is up.

    Args:
        model: its name in the API.
    """

    def __init__(self, model: str) -> None:
        self.model = model

    def tokens(self, prompt: tuple[int, ...], max_tokens: int = PROBE_TOKENS) -> list[int]:
        """Greedy continuation of a prompt."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        data = json.dumps(body | {"return_token_ids": True, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=RESTART_TIMEOUT_S) as response:
            answer = json.load(response)
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def engine_pids(self) -> list[int]:
        """Of all engines, the oldest first."""
        server = FOLDER.server()
        assert server is not None, "the server is gone"
        return [process.pid for process in engines(server)]

    def prefill_pid(self, prompt: tuple[int, ...]) -> int:
        """The engine that works when a prompt has one token to generate."""
        before = {pid: _cpu_s(pid) for pid in self.engine_pids()}
        self.tokens(prompt, max_tokens=1)
        return max(before, key=lambda pid: _cpu_s(pid) - before[pid])


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def serving_turn(turn: Turn, folder: Path, common: list[str], steps: int, app: str = "app:graph") -> Iterator[Service]:
    if app == RECORDED:
        shutil.rmtree(TIMELINES, ignore_errors=True)
    with serving(FOLDER, PORT, [f"model={folder}", *common, *turn.arguments(steps)], app):
        yield Service(folder.name)


def handoff_figures() -> dict[str, float]:
    """What the service says of hand-offs."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    kept = [line.rpartition(" ") for line in lines if line.startswith("kvrelay_handoff") and "_bucket" not in line]
    return {name: float(value) for name, _, value in kept}
