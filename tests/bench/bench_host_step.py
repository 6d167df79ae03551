"""What the host does in a step, with nothing to compute: CPU time of `Engine.step` by batch.

Run: `make bench-host-step`, on a machine that does little else. The engine is pipelined as on a GPU. Its runner lays
out every step as all runners do, draws the same token for everybody and launches nothing. So what is measured is
scheduling, runs, the step's arrays, sampling parameters, and at the end counting, publishing, outputs and statistics.
Not in it are the copy into pinned memory, the launch itself, the loop's commands and the tokens' way out.

Some batches take in a chunk of KV before each step, which is put into blocks that nobody reads yet, or the last chunk
of a hand-off, with which its sequence joins the batch; what that takes counts for the step. KV is that of a tiny model.

Times are of the thread's CPU clock, so that others on the machine disturb them little; the least and the median of all
steps are printed, and as the last line one JSON object. "Until launched" is the part before the launch: where an engine
waits for each step before it chooses the next one, as one with drafts does, a GPU waits for that part alone.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine.engine import Engine
from deployments.engine.execution.base import LaunchedStep, Preparation
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.messages import ChunkReady, DrawnToken, GenerateRequest, SamplingParams
from tests.bench.bench_engine import commit, cpu_model
from tests.engine.families import load
from tests.engine.insides import replace_runner, runner_of

MAX_NUM_SEQS, MAX_MODEL_LEN, BUDGET = 256, 1024, 16_384
NUM_PROMPT_TOKENS = 700
WARM_UP_STEPS = 10


class LayoutRunner:
    """Prepares steps, and launches nothing; see `Runner`."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._preparation = Preparation(cache)
        self.launched_s = 0.0

    def launch(self, scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        step = self._preparation.prepare(scheduled)
        self.launched_s = time.thread_time()
        return LaunchedStep(step.items, torch.ones(len(step.arrays.draw_rows), dtype=torch.int64), None)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A batch whose steps are timed.

    Attributes:
        name: as printed.
        num_seqs: sequences in it.
        temperature: of all.
        block_size: tokens per block.
        is_prefill: each step is the whole prompts of all, else one token of each.
        num_drafts: tokens that are guessed of each sequence, by lookup; all are right.
        arrives: before each step: a chunk of two blocks, or a whole prompt; empty: nothing.
    """

    name: str
    num_seqs: int
    temperature: float = 0.0
    block_size: int = 256
    is_prefill: bool = False
    num_drafts: int = 0
    arrives: Literal["", "chunk", "prompt"] = ""


SCENARIOS = (
    Scenario("1 decode", 1),
    Scenario("32 decodes", 32),
    Scenario("32 decodes, a chunk arrives", 32, arrives="chunk"),
    Scenario("32 decodes, a prompt arrives", 32, arrives="prompt"),
    Scenario("256 decodes", 256),
    Scenario("256 decodes, sampled", 256, temperature=0.7),
    Scenario("256 decodes, blocks of 16", 256, block_size=16),
    Scenario("16 prompts of 700", 16, is_prefill=True),
    Scenario("1 decode, 3 drafts", 1, num_drafts=3),
    Scenario("32 decodes, 3 drafts of each", 32, num_drafts=3),
    Scenario("128 decodes, 3 drafts of each", 128, num_drafts=3),
)


def build_engine(scenario: Scenario) -> Engine:
    drafts = scenario.num_drafts
    config = EngineConfig(
        block_size=scenario.block_size,
        num_blocks=(MAX_NUM_SEQS + 2) * MAX_MODEL_LEN // scenario.block_size,
        speculation=SpeculationConfig(method="ngram", max_drafts=drafts) if drafts else SpeculationConfig(),
        max_num_seqs=MAX_NUM_SEQS + 2,
        max_num_batched_tokens=BUDGET,
        max_model_len=MAX_MODEL_LEN,
    )
    engine = Engine(load("llama"), config, is_pipelined=True)
    replace_runner(engine, LayoutRunner(runner_of(engine).cache))
    return engine


def add(engine: Engine, scenario: Scenario, rng: random.Random) -> list[str]:
    names = [f"r{number}" for number in range(scenario.num_seqs)]
    for seed, name in enumerate(names):
        prompt = tuple(rng.randrange(100) for _ in range(NUM_PROMPT_TOKENS))
        sampling = SamplingParams(MAX_MODEL_LEN - NUM_PROMPT_TOKENS, scenario.temperature, seed=seed)
        engine.add(GenerateRequest(name, prompt, sampling))
    return names


def end(engine: Engine, names: list[str]) -> None:
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()


def timed_step(engine: Engine, arrive: Callable[[], object] = lambda: None) -> tuple[float, float]:
    """Seconds of the step, and of them those until it is launched."""
    runner = runner_of(engine)
    assert isinstance(runner, LayoutRunner)
    begun_s = time.thread_time()
    arrive()
    engine.step()
    return time.thread_time() - begun_s, runner.launched_s - begun_s


class Arrivals:
    """Prompts whose KV comes from elsewhere: their blocks are set aside, and one is answered with two tokens."""

    def __init__(self, engine: Engine, what: Literal["", "chunk", "prompt"], rng: random.Random) -> None:
        self._engine, self._what, self._rng = engine, what, rng
        self._num_blocks = -(-NUM_PROMPT_TOKENS // engine.limits.block_size)
        self._tensor = torch.zeros(runner_of(engine).cache.chunk_shape(self._num_blocks))
        self._number = 0
        if what == "chunk":
            self._await("incoming")

    def next(self) -> Callable[[], object]:
        """What takes in what arrives next."""
        if not self._what:
            return lambda: None
        if self._what == "chunk":  # again and again the same one, which is no error
            chunk = ChunkReady("incoming", 0, 0, self._num_blocks - 1)
            return partial(self._engine.import_chunk, chunk, self._tensor[:, :, :-1].contiguous())
        self._number += 1
        self._await(name := f"incoming-{self._number}")
        chunk = ChunkReady(name, 0, 0, self._num_blocks, is_last=True, first_token=DrawnToken(1))
        return partial(self._engine.import_chunk, chunk, self._tensor)

    def _await(self, name: str) -> None:
        prompt = tuple(self._rng.randrange(100) for _ in range(NUM_PROMPT_TOKENS))
        self._engine.add(GenerateRequest(name, prompt, SamplingParams(2, 0.0)), remote_threshold=0)
        while self._engine.stats().num_waiting:
            self._engine.step()


def measure(scenario: Scenario, num_steps: int) -> list[tuple[float, float]]:
    """Seconds of each step, and of them those until it is launched."""
    engine, rng = build_engine(scenario), random.Random(0)
    seconds: list[tuple[float, float]] = []
    if scenario.is_prefill:
        for _ in range(num_steps):
            names = add(engine, scenario, rng)
            seconds.append(timed_step(engine))
            end(engine, names)
        return seconds
    names = add(engine, scenario, rng)
    while engine.stats().num_waiting or engine.stats().num_queued_prompt_tokens:
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()
    arrivals = Arrivals(engine, scenario.arrives, rng)
    while len(seconds) < num_steps and engine.has_work:  # with drafts answers end earlier
        seconds.append(timed_step(engine, arrivals.next()))
    if not engine.has_work:
        seconds.pop()  # which launched nothing
    end(engine, [*names, "incoming"])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--steps", type=int, default=200, help="of each batch, at most 250, or 100 where prompts arrive"
    )
    parser.add_argument("--only", default="", help="run the scenarios whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [scenario for scenario in SCENARIOS if arguments.only in scenario.name]
    if not chosen or not 1 <= arguments.steps <= 250:
        parser.error(f"--only must be in one of {[scenario.name for scenario in SCENARIOS]}, --steps from 1 to 250")
    load_before, results = os.getloadavg(), []
    print(f"{'ms of CPU time per step':28} {'least':>8} {'median':>8} {'until launched: least':>22} {'median':>8}")
    for scenario in chosen:
        seconds, launched_s = zip(*measure(scenario, arguments.steps), strict=True)
        print(
            f"{scenario.name:28} {min(seconds) * 1e3:8.3f} {statistics.median(seconds) * 1e3:8.3f}"
            f" {min(launched_s) * 1e3:22.3f} {statistics.median(launched_s) * 1e3:8.3f}",
            flush=True,
        )
        results.append({"scenario": asdict(scenario), "seconds": seconds, "launched_s": launched_s})
    report = {
        "benchmark": "host-step",
        "commit": commit(),
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "load_average": [load_before, os.getloadavg()],
        "command": sys.argv,
        "results": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
