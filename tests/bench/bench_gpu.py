"""The whole engine loop on one GPU, with random weights: time per output token, prefill, throughput, against a floor.

Run: `make bench-gpu` on a machine with a GPU. The engine is driven as `EngineLoop` drives it, scheduler, sampler and
events included. Prints a table beside vLLM's figures (same shapes, dummy weights, greedy) and floors (of
tokens: weights and KV read once at the speed of a copy; of prompts: the linear layers alone) and, as its last line, one
JSON object with the raw numbers. A row that fails says why, and the others are measured. `ARGS=--profile` says instead
where the GPU's time goes in the run that measures throughput.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import transformers

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.scheduling.retention import Retention
from deployments.messages import GenerateRequest, SamplingParams, TokenOutput
from tests.bench.gpu_floors import copy_bandwidth, decode_bytes, floor, lengths, products_alone, throughput_bound
from tests.bench.gpu_profile import gpu_seconds
from tests.bench.gpu_shapes import SHAPES, VLLM_VERSION, Shape
from tests.bench.random_models import load_random
from tests.engine.insides import forget_step_in_flight

PROMPT_TOKENS = 256
MEASURED_STEPS = 100
# Decodes, and tokens of the prompt that is computed beside them, and of it those that are cached.
BESIDE = ((8, 256, 0), (128, 256, 0), (128, 128, 1024))


def build(shape: Shape, max_num_seqs: int, kv_dtype: Literal["auto", "fp8"] = "auto") -> Engine:
    """An engine with random weights."""
    longest = min(12288, int(shape.config().max_position_embeddings))
    settings = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=16384,
        max_model_len=longest,
        hands_over=False,
        kv_dtype=kv_dtype,
    )
    return Engine(load_random(shape), settings)


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


def profile_throughput(
    name: str, shape: Shape, bandwidth: float, kv_dtype: Literal["auto", "fp8"]
) -> dict[str, dict[str, float]]:
    """Seconds of the GPU by kind of kernel, printed: steps with prompts, those with decodes alone, and their floor."""
    engine = build(shape, max_num_seqs=256, kv_dtype=kv_dtype)
    driver = Driver(engine, shape.config().vocab_size)
    rate = repeated(partial(throughput, driver), 1)[0]
    add_lengths(driver)

    def start_all() -> None:
        started = 0
        while started < len(lengths()):
            started += sum(output.index == 0 for output in driver.step())

    found = {"steps with prompts": gpu_seconds(start_all), "steps of decodes": gpu_seconds(driver.drain)}
    print(f"{name}: {rate:.0f} output tokens/s without the profiler")
    for phase, seconds in found.items():
        total = sum(seconds.values())
        print(f"{phase}: {total:.2f} s")
        for kind, part in seconds.items():
            print(f"  {kind:34}{part:8.3f} s{part / total:7.1%}")
    weights, kv = decode_bytes(engine)
    found["floor"] = {"products": weights / bandwidth, "attention of decodes": kv / bandwidth}
    print(f"floor of all decodes: weights {weights / bandwidth:.2f} s, KV {kv / bandwidth:.2f} s")
    return found


def repeated(measure: Callable[[], float], repeats: int) -> list[float]:
    """One run to warm up, then those that count."""
    measure()
    return [measure() for _ in range(repeats)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-gpu ARGS=...")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which models; all by default"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        help="only rows of these labels: token-1, beside-8+256, beside-128+128@1024, prefill-1x512, tokens/s",
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        default=[],
        type=_parse_context,
        metavar="SEQUENCESxTOKENS",
        help="tokens behind long prompts as well, in rows context-64x8192; of Llama-3.1-8B these take 69 GB of KV",
    )
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="as engine.kv_dtype")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where the GPU's time goes in the run of 256 requests")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu needs a GPU", file=sys.stderr)
        return 1
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bandwidth": bandwidth,
        "kv_dtype": options.kv_dtype,
        "models": {},
    }
    print(f"{result['device']}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    for name in options.shapes:
        if options.profile:
            found = profile_throughput(name, SHAPES[name], bandwidth, options.kv_dtype)
        else:
            found = measure_model(name, SHAPES[name], bandwidth, options)
        result["models"][name] = found
        gc.collect()  # an engine's graphs and pool, before the next one sizes its own
        torch.cuda.empty_cache()
    print(json.dumps(result))
    return 0


def _parse_context(value: str) -> tuple[int, int]:
    count, tokens = map(int, value.split("x"))
    return count, tokens


def measure_model(name: str, shape: Shape, bandwidth: float, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model, printed as they come."""
    begun = time.perf_counter()
    config = shape.config()
    try:
        engine = build(shape, max_num_seqs=256, kv_dtype=options.kv_dtype)
    except (RuntimeError, ValueError) as error:
        print(f"\n{name}: does not start: {_reason(error)}", flush=True)
        return {"failed": _reason(error)}
    print(f"\n{name}: ready in {time.perf_counter() - begun:.1f} s, {engine.limits}", flush=True)
    driver = Driver(engine, config.vocab_size)
    found: dict[str, Any] = {"tpot": {}, "context": {}, "beside": {}, "prefill": {}, "products": {}, "failed": {}}
    measure = partial(_measure_row, found["failed"], options)
    print(f"{'':24}{'vLLM ' + VLLM_VERSION:>12}{'engine':>12}{'ratio':>8}{'floor':>10}")
    for batch_size, peer in shape.tpot_ms.items():
        run = partial(time_per_output_token, driver, batch_size)
        times = measure(f"token-{batch_size}", driver, partial(repeated, run, options.repeats))
        if times:
            found["tpot"][batch_size] = times
            least = floor(engine, batch_size, bandwidth, PROMPT_TOKENS + MEASURED_STEPS / 2) * 1e3
            _print_row(f"token, batch {batch_size}", peer, statistics.median(times) * 1e3, least)
    for count, tokens in options.contexts:
        run_all = partial(times_with_context, driver, count, tokens, options.repeats)
        times = measure(f"context-{count}x{tokens}", driver, run_all)
        if times:
            found["context"][f"{count}x{tokens}"] = times
            least = floor(engine, count, bandwidth, tokens + options.repeats * MEASURED_STEPS / 2) * 1e3
            _print_row(f"token, {count} x {tokens}", None, statistics.median(times) * 1e3, least)
    for num_decodes, tokens, cached in BESIDE:
        label = f"beside-{num_decodes}+{tokens}" + (f"@{cached}" if cached else "")
        run = partial(time_beside_prompts, driver, num_decodes, tokens, cached)
        times = measure(label, driver, partial(repeated, run, options.repeats))
        if times:
            found["beside"][label] = times
            what = f"{num_decodes} tokens + {tokens}" + (f" @ {cached}" if cached else "")
            _print_row(what, None, statistics.median(times) * 1e3, None)
    for (count, tokens), peer in shape.prefill_ms.items():
        run = partial(prefill, driver, count, tokens)
        label = f"prefill-{count}x{tokens}"
        times = measure(label, driver, partial(repeated, run, options.repeats))
        if times:
            found["prefill"][f"{count}x{tokens}"] = times
            alone = measure(label, driver, partial(products_alone, engine, count * tokens))
            found["products"][f"{count}x{tokens}"] = alone
            floor_ms = statistics.median(alone) * 1e3 if alone else None
            _print_row(f"prefill {count} x {tokens}", peer, statistics.median(times) * 1e3, floor_ms)
    rates = measure("tokens/s", driver, partial(repeated, partial(throughput, driver), options.repeats))
    if rates:
        found["throughput"] = rates
        median, peer = statistics.median(rates), shape.throughput
        ratio = "" if peer is None else f"{median / peer:8.2f}"
        print(f"{'output tokens/s':24}{peer or '':>12}{median:12.0f}{ratio}")
        if evenly := found["prefill"].get("16x1024"):
            bound = throughput_bound(engine, bandwidth, 16 * 1024 / statistics.median(evenly))
            found["throughput_bound"] = bound
            print(f"{'of a bound of':24}{'':12}{bound:12.0f}{median / bound:8.0%}", flush=True)
    return found


def _measure_row(
    failed: dict[str, str], options: argparse.Namespace, label: str, driver: Driver, run: Callable[[], list[float]]
) -> list[float]:
    """All figures of one row; none where it was not asked for, or failed, which is noted and printed."""
    if options.rows and label not in options.rows:
        return []
    try:
        return run()
    except RuntimeError as error:
        failed[label] = _reason(error)
        print(f"{label:24}{failed[label]}", flush=True)
    driver.abort_all()
    return []


def _reason(error: Exception) -> str:
    """One line; being out of memory is called that."""
    first = str(error).splitlines()[0] if str(error) else ""
    name = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{name}: {first}"


def _print_row(label: str, peer_ms: float | None, ours_ms: float, least_ms: float | None) -> None:
    beside = (
        f"{'':12}{ours_ms:12.2f}{'':8}"
        if peer_ms is None
        else f"{peer_ms:12.2f}{ours_ms:12.2f}{peer_ms / ours_ms:8.2f}"
    )
    end = "" if least_ms is None else f"{least_ms:10.2f}"
    print(f"{label:24}{beside}{end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
