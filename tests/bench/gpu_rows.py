"""How each row of `bench_gpu` is measured: an engine that is fed and stepped as `EngineLoop` does it."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from deployments.engine.engine import Engine
from deployments.engine.scheduling.retention import Retention
from deployments.messages import GenerateRequest, SamplingParams, TokenOutput
from tests.bench.gpu_shapes import PROMPT_TOKENS, lengths
from tests.engine.insides import forget_step_in_flight

MEASURED_STEPS = 100


class Driver:
    """Feeds an engine with requests of random tokens and steps it."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.engine = engine
        self._rng = np.random.default_rng(0)
        self._vocab_size = vocab_size
        self._count = 0
        self._begun_at = 1

    def add(self, prompt_tokens: int, output_tokens: int, behind: tuple[int, ...] = ()) -> None:
        """A prompt of random tokens behind given ones."""
        prompt = behind + self.random_tokens(prompt_tokens)
        self._count += 1
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0)
        self.engine.add(GenerateRequest(f"r{self._count}", prompt, sampling))

    def random_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.integers(0, self._vocab_size, count).tolist())

    def abort_all(self) -> None:
        """Give up on what runs, after a step that failed."""
        for number in range(self._begun_at, self._count + 1):
            self.engine.abort(f"r{number}")
        self._begun_at = self._count + 1
        forget_step_in_flight(self.engine)

    def step(self) -> list[TokenOutput]:
        return [event for event in self.engine.step() if isinstance(event, TokenOutput)]

    def drain(self) -> int:
        """Run until nothing is left; returns the tokens that came."""
        total = 0
        while self.engine.has_work:
            total += len(self.step())
        return total


def time_per_output_token(driver: Driver, batch_size: int) -> float:
    """Seconds per step while `batch_size` sequences decode, the prompts' time left out."""
    return times_with_context(driver, batch_size, PROMPT_TOKENS, 1)[0]


def times_with_context(driver: Driver, batch_size: int, prompt_tokens: int, repeats: int) -> list[float]:
    """Seconds per step while `batch_size` sequences decode behind such prompts, several times without new prompts.

    Raises:
        RuntimeError: the pool has no room for them.
    """
    output_tokens = repeats * MEASURED_STEPS + 40
    limits = driver.engine.limits
    needed = batch_size * Retention.of(limits).least_blocks(prompt_tokens + output_tokens)
    if needed > limits.num_blocks:
        raise RuntimeError(f"needs {needed} blocks of KV, the pool has {limits.num_blocks}")
    for _ in range(batch_size):
        driver.add(prompt_tokens, output_tokens)
    started = 0
    while started < batch_size:  # every prompt has drawn its first token
        started += sum(output.index == 0 for output in driver.step())
    for _ in range(5):
        driver.step()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(MEASURED_STEPS):
            assert len(driver.step()) == batch_size
        times.append((time.perf_counter() - begun) / MEASURED_STEPS)
    driver.drain()
    return times


def time_beside_prompts(driver: Driver, num_decodes: int, prompt_tokens: int, cached_tokens: int) -> float:
    """Seconds per step while sequences decode and each step computes one prompt, some of it cached, beside them."""
    behind = driver.random_tokens(cached_tokens)
    driver.add(1, 1, behind)
    driver.drain()
    for _ in range(num_decodes):
        driver.add(PROMPT_TOKENS, MEASURED_STEPS + 40)
    started = 0
    while started < num_decodes:
        started += sum(output.index == 0 for output in driver.step())
    times = []
    for _ in range(MEASURED_STEPS // 2):
        driver.add(prompt_tokens, 1, behind)
        begun = time.perf_counter()
        driver.step()
        times.append(time.perf_counter() - begun)
    driver.drain()
    return statistics.median(times)


def prefill(driver: Driver, count: int, prompt_tokens: int) -> float:
    """Seconds until every one of several prompts, given at once, has its first token."""
    for _ in range(count):
        driver.add(prompt_tokens, 1)
    begun = time.perf_counter()
    driver.drain()
    return time.perf_counter() - begun


def add_lengths(driver: Driver) -> None:
    """Give the engine the requests of `throughput`."""
    for prompt_tokens, output_tokens in lengths().tolist():
        driver.add(prompt_tokens, output_tokens)


def throughput(driver: Driver) -> float:
    """Output tokens per second of requests with uniform lengths, given at once."""
    add_lengths(driver)
    begun = time.perf_counter()
    return driver.drain() / (time.perf_counter() - begun)


def repeated(measure: Callable[[], float], repeats: int) -> list[float]:
    """One run to warm up, then those that count."""
    measure()
    return [measure() for _ in range(repeats)]
