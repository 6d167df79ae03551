"""Our engine beside transformers' `generate` and `generate_batch`, in one process, on the same weights and threads.

Run: `make bench-engine`. Prints its progress, tables, and as its last line one JSON object with every raw number.
Contestants take turns within each round, in another order every time, so that a busy machine slows all of them; medians
are compared. Every round has new random prompts: nobody profits from a prefix cache. Ends of text are ignored, so that
all generate the same number of tokens.

The reference models are copies of their own, unmodified, with transformers' own attention.

`--avx2` takes AVX-512 away from all of them, by the libraries' own settings (`instruction_set.py`); what is in force is
printed first. Caches, memory and clock stay those of the machine at hand.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.model.load import LoadedModel, load_model
from deployments.engine.process import configure_process
from deployments.messages import GenerateRequest, SamplingParams, TokenOutput
from tests.bench.instruction_set import AVX2_ONLY, in_force

PROMPT_TOKENS, OUTPUT_TOKENS, LONG_PROMPT_TOKENS = 128, 64, 2048
BATCH_SIZES = (16, 1)
VOCAB_SIZE = 49_000
KV_CACHE_BYTES = 256 << 20  # several times what any scenario needs

Prompts = list[list[int]]
Contestant = Callable[[Prompts], list[list[int]]]


@dataclass(frozen=True)
class Scenario:
    """One race: who takes part, with what, and what a second is worth.

    Attributes:
        name: as printed.
        num_prompts: prompts of a round.
        prompt_tokens: tokens of each.
        counted_tokens: tokens that one run is credited with.
        contestants: the first one is ours.
    """

    name: str
    num_prompts: int
    prompt_tokens: int
    counted_tokens: int
    contestants: dict[str, Contestant]


@dataclass
class Result:
    """Raw seconds of each contestant, round by round, and how many of its outputs were the first one's."""

    scenario: str
    counted_tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    same_outputs: dict[str, list[int]] = field(default_factory=dict)

    def tokens_per_s(self, contestant: str) -> float:
        return self.counted_tokens / statistics.median(self.seconds[contestant])


def random_prompts(count: int, num_tokens: int, seed: int) -> Prompts:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(count)]


def ours(engine: Engine, max_tokens: int) -> Contestant:
    def run(prompts: Prompts) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        for i, prompt in enumerate(prompts):
            engine.add(GenerateRequest(f"r{i}", tuple(prompt), sampling))
        outputs: list[list[int]] = [[] for _ in prompts]
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, TokenOutput):
                    outputs[int(event.request_id[1:])] += event.token_ids
        return outputs

    return run


def theirs_generate(model: Any) -> Contestant:
    config = GenerationConfig(do_sample=False, max_new_tokens=OUTPUT_TOKENS, pad_token_id=0, use_cache=True)

    def run(prompts: Prompts) -> list[list[int]]:
        inputs = torch.tensor(prompts)
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        tokens: list[list[int]] = output[:, inputs.shape[1] :].tolist()
        return tokens

    return run


def theirs_generate_batch(model: Any) -> Contestant:
    # An id that is never drawn: without any, `generate_batch` takes the tokenizer's default.
    config = GenerationConfig(do_sample=False, max_new_tokens=OUTPUT_TOKENS, eos_token_id=-1, pad_token_id=0)
    # Its defaults are for GPUs: it reads whole pages and masks them, so small pages and batches serve it best on a CPU
    # (16 sequences: 23 to 31 tokens/s with these, 12 with pages of 256 and no bound; 2 shared cores, 2026-11).
    pages = ContinuousBatchingConfig(page_size=32, max_batch_tokens=256, num_blocks=128)

    def run(prompts: Prompts) -> list[list[int]]:
        results = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=pages, persistent_manager=True
        )
        by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
        return [by_prompt[tuple(prompt)] for prompt in prompts]

    return run


def theirs_forward(model: Any, **options: int) -> Contestant:
    @torch.inference_mode()
    def run(prompts: Prompts) -> list[list[int]]:
        logits = model(torch.tensor(prompts), use_cache=True, **options).logits
        tokens: list[list[int]] = logits[:, -1].argmax(-1, keepdim=True).tolist()
        return tokens

    return run


def load_reference(path: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    model.generation_config.eos_token_id = None
    return model


def build_scenarios(loaded: LoadedModel) -> list[Scenario]:
    generate, batched = load_reference(loaded.path), load_reference(loaded.path)
    engine = Engine(loaded, EngineConfig(kv_cache_bytes=KV_CACHE_BYTES))
    decode = {
        "engine": ours(engine, OUTPUT_TOKENS),
        "generate": theirs_generate(generate),
        "generate_batch": theirs_generate_batch(batched),
    }
    uncached = EngineConfig(kv_cache_bytes=KV_CACHE_BYTES, enable_prefix_caching=False)
    one_step = uncached.model_copy(update={"max_num_batched_tokens": LONG_PROMPT_TOKENS})
    prefill = {
        "engine": ours(Engine(loaded, uncached), 1),
        f"engine, steps of {LONG_PROMPT_TOKENS}": ours(Engine(loaded, one_step), 1),
        "forward, all logits": theirs_forward(generate),
        "forward, logits_to_keep=1": theirs_forward(generate, logits_to_keep=1),
    }
    return [
        *(Scenario(f"decode, {n} sequences", n, PROMPT_TOKENS, n * OUTPUT_TOKENS, decode) for n in BATCH_SIZES),
        Scenario(f"prefill of {LONG_PROMPT_TOKENS} tokens", 1, LONG_PROMPT_TOKENS, LONG_PROMPT_TOKENS, prefill),
    ]


def race(scenario: Scenario, num_rounds: int) -> Result:
    """Run all rounds, after one that is not counted."""
    result = Result(scenario.name, scenario.counted_tokens)
    names = list(scenario.contestants)
    for round_ in range(-1, num_rounds):
        prompts = random_prompts(scenario.num_prompts, scenario.prompt_tokens, seed=1000 + round_)
        outputs: dict[str, list[list[int]]] = {}
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            outputs[name] = scenario.contestants[name](prompts)
            elapsed = time.perf_counter() - start
            print(
                f"{scenario.name}, round {round_ if round_ >= 0 else 'to warm up'}: {name} {elapsed:.2f} s", flush=True
            )
            if round_ >= 0:
                result.seconds.setdefault(name, []).append(elapsed)
        lengths = {name: {len(tokens) for tokens in rows} for name, rows in outputs.items()}
        assert len({frozenset(lens) for lens in lengths.values()}) == 1, f"not the same work: {lengths}"
        if round_ >= 0:
            for name in names[1:]:
                pairs = zip(outputs[name], outputs[names[0]], strict=True)
                result.same_outputs.setdefault(name, []).append(sum(a == b for a, b in pairs))
    return result


def print_table(result: Result) -> None:
    first = next(iter(result.seconds))
    print(f"\n{result.scenario}\n{'':28} {'tokens/s':>9} {'engine is':>10} {'seconds':>16} {'same outputs':>14}")
    for name, seconds in result.seconds.items():
        ratio = result.tokens_per_s(first) / result.tokens_per_s(name)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        same = "" if name == first else str(result.same_outputs[name])
        print(f"{name:28} {result.tokens_per_s(name):9.1f} {ratio:9.2f}x {spread:>16} {same:>14}")


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="at least 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run the scenarios whose name contains this")
    parser.add_argument("--avx2", action="store_true", help="as on a CPU without AVX-512")
    arguments = parser.parse_args()
    if arguments.avx2 and not AVX2_ONLY.items() <= os.environ.items():  # they are read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2_ONLY})
    configure_process(arguments.threads)  # theirs profit as well
    instructions, load_before = in_force(), os.getloadavg()
    print(f"instructions: {instructions}; load average before: {load_before}", flush=True)
    loaded = load_model(EngineConfig(device="cpu"))
    scenarios = build_scenarios(loaded)
    chosen = [scenario for scenario in scenarios if arguments.only in scenario.name]
    if not chosen:
        parser.error(f"--only {arguments.only!r} is in none of {[scenario.name for scenario in scenarios]}")
    results = [race(scenario, arguments.rounds) for scenario in chosen]
    for result in results:
        print_table(result)
    report = {
        "benchmark": "engine",
        "commit": commit(),
        "cpu": cpu_model(),
        "instructions": instructions,
        "cores": os.cpu_count(),
        "load_average": [load_before, os.getloadavg()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": arguments.rounds,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
