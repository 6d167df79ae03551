"""The whole engine loop on one GPU, with random weights: time per output token, prefill, throughput, against a floor.

Run: `make bench-gpu` on a machine with a GPU. The engine is driven as `EngineLoop` drives it, scheduler, sampler and
events included. Prints a table beside vLLM 0.24's figures on an H100 80GB (same shapes, dummy weights, greedy) and, as
its last line, one JSON object with the raw numbers. `ARGS=--profile` says instead where the GPU's time goes in the run
that measures throughput.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.model import LoadedModel, optimize_layers, prepare_model
from deployments.messages import GenerateRequest, SamplingParams, TokenOutput
from tests.bench.gpu_profile import gpu_seconds

PROMPT_TOKENS = 256
MEASURED_STEPS = 100
VLLM: dict[str, Any] = {
    "llama-8b": {
        "tpot": {1: 6.51, 8: 6.69, 32: 7.34, 128: 9.75, 256: 13.67},
        "prefill": {(1, 512): 17.4, (1, 2048): 53.1, (1, 8192): 210.0, (16, 1024): 380.0},
        "throughput": 8301.0,
    },
    "qwen3-0.6b": {"tpot": {1: 2.46, 8: 3.04, 32: 3.48, 128: 4.81, 256: 9.49}, "prefill": {}, "throughput": None},
}


def shapes() -> dict[str, PretrainedConfig]:
    """Configurations of the models that are measured; weights are random."""
    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    qwen = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    return {"llama-8b": llama, "qwen3-0.6b": qwen}


def load_random(config: PretrainedConfig) -> LoadedModel:
    """A model with random weights, the same each time, as `load_model` would have prepared it."""
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fill_random(model)
    loaded = prepare_model(model, "random", torch.device("cuda"))
    return replace(loaded, has_cuda_layers=optimize_layers(model))


def fill_random(model: PreTrainedModel) -> None:
    """Give every matrix random weights, the same each time."""
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)


def build(config: PretrainedConfig, max_num_seqs: int) -> Engine:
    """An engine with random weights."""
    settings = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=16384, max_model_len=12288)
    return Engine(load_random(config), settings)


class Driver:
    """Feeds an engine with requests of random tokens and steps it."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.engine = engine
        self._rng = np.random.default_rng(0)
        self._vocab_size = vocab_size
        self._count = 0

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        prompt = tuple(self._rng.integers(0, self._vocab_size, prompt_tokens).tolist())
        self._count += 1
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0)
        self.engine.add(GenerateRequest(f"r{self._count}", prompt, sampling))

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
    for _ in range(batch_size):
        driver.add(PROMPT_TOKENS, MEASURED_STEPS + 40)
    started = 0
    while started < batch_size:  # every prompt has drawn its first token
        started += sum(output.index == 0 for output in driver.step())
    for _ in range(5):
        driver.step()
    begun = time.perf_counter()
    for _ in range(MEASURED_STEPS):
        assert len(driver.step()) == batch_size
    elapsed = time.perf_counter() - begun
    driver.drain()
    return elapsed / MEASURED_STEPS


def prefill(driver: Driver, count: int, prompt_tokens: int) -> float:
    """Seconds until every one of several prompts, given at once, has its first token."""
    for _ in range(count):
        driver.add(prompt_tokens, 1)
    begun = time.perf_counter()
    driver.drain()
    return time.perf_counter() - begun


def lengths() -> np.ndarray:
    """Prompt and output tokens of the 256 requests of `throughput`, uniform: (256, 2)."""
    return np.random.default_rng(1).integers(100, 1025, (256, 2))


def add_lengths(driver: Driver) -> None:
    """Give the engine the requests of `throughput`."""
    for prompt_tokens, output_tokens in lengths().tolist():
        driver.add(prompt_tokens, output_tokens)


def throughput(driver: Driver) -> float:
    """Output tokens per second of requests with uniform lengths, given at once."""
    add_lengths(driver)
    begun = time.perf_counter()
    return driver.drain() / (time.perf_counter() - begun)


def copy_bandwidth() -> float:
    """Bytes per second of a copy on the GPU, those read and those written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(2 * source.nbytes / statistics.median(times))


def weight_bytes(engine: Engine) -> int:
    """What a decode step reads of the model, whatever its batch."""
    from deployments.engine.cuda_layers import SkinnyLinear  # only where there is a GPU

    model = engine._runner._model  # type: ignore[attr-defined]
    weights = {m.weight.data_ptr(): m.weight.nbytes for m in model.modules() if isinstance(m, SkinnyLinear)}
    return sum(weights.values())


def floor(engine: Engine, batch_size: int, bandwidth: float) -> float:
    """Seconds that reading the weights and the KV once takes."""
    context = PROMPT_TOKENS + MEASURED_STEPS / 2
    num_bytes = weight_bytes(engine) + batch_size * context * engine.kv_shape.bytes_per_token
    return float(num_bytes) / bandwidth


def throughput_bound(engine: Engine, bandwidth: float, prompt_tokens_per_s: float) -> float:
    """Tokens per second of `throughput` if decode steps did nothing but read weights and KV at this bandwidth.

    Prompts are counted at the rate at which this engine computes them.
    """
    prompts, outputs = lengths().T
    return float(outputs.sum() / (sum(decode_bytes(engine)) / bandwidth + prompts.sum() / prompt_tokens_per_s))


def decode_bytes(engine: Engine) -> tuple[float, float]:
    """What the decode steps of `throughput` must read: of weights, of KV."""
    prompts, outputs = lengths().T
    # The first token is the prompt's; step n of a sequence reads its prompt and n tokens more.
    contexts = (prompts * (outputs - 1) + outputs * (outputs - 1) / 2).sum()
    return float((outputs.max() - 1) * weight_bytes(engine)), float(contexts * engine.kv_shape.bytes_per_token)


def profile_throughput(name: str, config: PretrainedConfig, bandwidth: float) -> dict[str, dict[str, float]]:
    """Seconds of the GPU by kind of kernel, printed: steps with prompts, those with decodes alone, and their floor."""
    engine = build(config, max_num_seqs=256)
    driver = Driver(engine, config.vocab_size)
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
    parser.add_argument("--only", choices=sorted(VLLM))
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
        "models": {},
    }
    print(f"{result['device']}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    for name, config in shapes().items():
        if options.only not in (None, name):
            continue
        if options.profile:
            result["models"][name] = profile_throughput(name, config, bandwidth)
        else:
            result["models"][name] = measure_model(name, config, bandwidth, options.repeats)
        gc.collect()  # an engine's graphs and pool, before the next one sizes its own
        torch.cuda.empty_cache()
    print(json.dumps(result))
    return 0


def measure_model(name: str, config: PretrainedConfig, bandwidth: float, repeats: int) -> dict[str, Any]:
    """All figures of one model, printed as they come."""
    begun = time.perf_counter()
    engine = build(config, max_num_seqs=256)
    driver = Driver(engine, config.vocab_size)
    print(f"\n{name}: ready in {time.perf_counter() - begun:.1f} s, {engine.limits}", flush=True)
    found: dict[str, Any] = {"tpot": {}, "prefill": {}}
    print(f"{'':24}{'vLLM 0.24':>12}{'engine':>12}{'ratio':>8}{'floor':>10}")
    for batch_size, peer in VLLM[name]["tpot"].items():
        times = repeated(partial(time_per_output_token, driver, batch_size), repeats)
        found["tpot"][batch_size] = times
        least = floor(engine, batch_size, bandwidth) * 1e3
        _print_row(f"token, batch {batch_size}", peer, statistics.median(times) * 1e3, least)
    for (count, prompt_tokens), peer in VLLM[name]["prefill"].items():
        times = repeated(partial(prefill, driver, count, prompt_tokens), repeats)
        found["prefill"][f"{count}x{prompt_tokens}"] = times
        _print_row(f"prefill {count} x {prompt_tokens}", peer, statistics.median(times) * 1e3, None)
    rates = repeated(partial(throughput, driver), repeats)
    found["throughput"] = rates
    median = statistics.median(rates)
    print(f"{'output tokens/s':24}{VLLM[name]['throughput'] or '':>12}{median:12.0f}")
    if evenly := found["prefill"].get("16x1024"):
        bound = throughput_bound(engine, bandwidth, 16 * 1024 / statistics.median(evenly))
        found["throughput_bound"] = bound
        print(f"{'of a bound of':24}{'':12}{bound:12.0f}{median / bound:8.0%}")
    return found


def _print_row(label: str, peer_ms: float, ours_ms: float, least_ms: float | None) -> None:
    end = "" if least_ms is None else f"{least_ms:10.2f}"
    print(f"{label:24}{peer_ms:12.2f}{ours_ms:12.2f}{peer_ms / ours_ms:8.2f}{end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
