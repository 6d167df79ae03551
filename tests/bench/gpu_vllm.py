"""The rows of `bench_gpu`, of vLLM's offline engine: the peer's side, for another environment on the same card.

vLLM has another torch than this project. Run both in one visit, from the root of the repository:

    PYTHON-WITH-VLLM -m tests.bench.gpu_vllm --shapes mistral-7b-window --out vllm.json
    make bench-gpu ARGS="--shapes mistral-7b-window --beside vllm.json"

Dummy weights, random prompts, greedy, no prefix caching, chunks as large as ours. A time per token is the run with 140
tokens less the run with 40, over 100, so that prompts cancel out. Each model is measured in a process of its own and
written at once; times are in seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.bench.gpu_shapes import MAX_NUM_SEQS, MAX_TOKENS, PROMPT_TOKENS, SHAPES, Shape, lengths, longest

SHORT, LONG = 40, 140
# Of the card's memory; what weights of 57 GiB leave of less has no room for 256 sequences.
_MEMORY = 0.92


class VllmEngine:
    """vLLM with dummy weights, and the random prompts that it is given.

    Args:
        shape: of the model.
        folder: for its configuration.
    """

    def __init__(self, shape: Shape, folder: Path) -> None:
        import vllm

        write_config(shape, folder)
        self._params: Callable[..., Any] = vllm.SamplingParams
        self._rng, self._vocab_size = np.random.default_rng(0), shape.config().vocab_size
        self._llm = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=longest(shape),
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_TOKENS,
            gpu_memory_utilization=_MEMORY,
            enable_prefix_caching=False,
            # Its own FP8 is made while it loads; MXFP4 is said in the configuration, as in checkpoints.
            quantization="fp8" if shape.quantization == "fp8" else None,
            generation_config="vllm",
            seed=0,
        )

    def run(self, sizes: list[tuple[int, int]]) -> float:
        """Seconds until all of (prompt tokens, output tokens), given at once, are answered."""
        prompts = [{"prompt_token_ids": self._rng.integers(0, self._vocab_size, count).tolist()} for count, _ in sizes]
        params = [
            self._params(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for _, count in sizes
        ]
        begun = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - begun
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if counts != [count for _, count in sizes]:
            raise RuntimeError(f"{sum(counts)} tokens came, {sum(count for _, count in sizes)} were asked for")
        return elapsed


def write_config(shape: Shape, folder: Path) -> None:
    """What vLLM loads the model from."""
    config = shape.config()
    values = config.to_dict() | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]],
        "dtype": "bfloat16",
    }
    if shape.quantization == "mxfp4":
        values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(values, default=str))


def time_per_token(engine: VllmEngine, batch_size: int) -> float:
    """Seconds of a token of each of so many sequences."""
    short, long = (engine.run([(PROMPT_TOKENS, count)] * batch_size) for count in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


def throughput(engine: VllmEngine) -> float:
    """Output tokens per second of requests with uniform lengths, given at once."""
    sizes = [(int(prompt), int(output)) for prompt, output in lengths()]
    return sum(output for _, output in sizes) / engine.run(sizes)


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """All rows of one model, printed as they come."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine = VllmEngine(shape, Path(folder))
        found: dict[str, Any] = {"start_s": time.perf_counter() - begun, "tpot": {}, "prefill": {}}
        print(f"ready in {found['start_s']:.0f} s", flush=True)

        repeated = partial(_repeated, repeats)
        for size in shape.batch_sizes:
            found["tpot"][str(size)] = repeated(f"token, batch {size}", partial(time_per_token, engine, size))
        for count, tokens in shape.prompts:
            run = partial(engine.run, [(tokens, 1)] * count)
            found["prefill"][f"{count}x{tokens}"] = repeated(f"prefill {count} x {tokens}", run)
        found["throughput"] = repeated("output tokens/s", partial(throughput, engine), scale=1.0)
    return found


def _repeated(repeats: int, label: str, run: Callable[[], float], scale: float = 1e3) -> list[float]:
    """Figures after one run to warm up; their median is printed."""
    run()
    values = [run() for _ in range(repeats)]
    print(f"{label:24}{statistics.median(values) * scale:12.2f}", flush=True)
    return values


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file, for `--beside` of bench-gpu")
    options = parser.parse_args()
    try:
        import torch
        import vllm
    except ImportError as error:
        print(f"run this with a Python that has vLLM: {error}", file=sys.stderr)
        return 1
    measured = {"device": torch.cuda.get_device_name(), "vllm": vllm.__version__}
    try:
        models = known_models(options.out, measured)
    except (OSError, ValueError) as error:
        parser.error(f"--out {options.out}: {error}")
    if len(options.shapes) > 1:
        return max(_in_a_process(name, options) for name in options.shapes)
    (name,) = options.shapes
    print(f"\n{name}: vLLM {vllm.__version__}, torch {torch.__version__}, {measured['device']}", flush=True)
    models[name] = measure(SHAPES[name], options.repeats)
    result = measured | {"models": models}
    options.out.write_text(json.dumps(result))
    print(json.dumps(result))
    return 0


def known_models(path: Path, measured: dict[str, str]) -> dict[str, Any]:
    """What a file holds of the same card and vLLM, to which other models are added.

    Raises:
        ValueError: it is of others, or no such file.
        OSError: it can neither be read nor written.
    """
    with open(path, "a+") as file:
        file.seek(0)
        text = file.read()
    content = json.loads(text) if text else measured | {"models": {}}
    if not isinstance(content, dict) or any(content.get(key) != value for key, value in measured.items()):
        raise ValueError(f"holds other figures than those of {measured['device']} and vLLM {measured['vllm']}")
    models: dict[str, Any] = content["models"]
    return models


def _in_a_process(name: str, options: argparse.Namespace) -> int:
    given = ["--shapes", name, "--repeats", str(options.repeats), "--out", str(options.out)]
    return subprocess.run([sys.executable, "-m", "tests.bench.gpu_vllm", *given], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
