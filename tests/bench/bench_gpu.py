"""The whole engine loop on one GPU, with random weights: time per output token, prefill, throughput, against a floor.

Run: `make bench-gpu` on a machine with a GPU. The engine is driven as `EngineLoop` drives it, scheduler, sampler and
events included. Prints a table beside floors (of
tokens: weights and KV read once at the speed of a copy; of prompts: the linear layers alone) and, as its last line, one
JSON object with the raw numbers. A row that fails says why, and the others are measured. `ARGS="--beside FILE"` shows
what vLLM took for the same rows on the same card: `tests.bench.gpu_vllm` measures that, and says how. `ARGS=--profile`
says instead where the GPU's time goes in the run that measures throughput.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from tests.bench.gpu_floors import copy_bandwidth, decode_bytes, floor, products_alone, throughput_bound
from tests.bench.gpu_peer import Peer
from tests.bench.gpu_profile import gpu_seconds
from tests.bench.gpu_rows import (
    MEASURED_STEPS,
    Driver,
    add_lengths,
    prefill,
    repeated,
    throughput,
    time_beside_prompts,
    time_per_output_token,
    times_with_context,
)
from tests.bench.gpu_shapes import MAX_NUM_SEQS, MAX_TOKENS, PROMPT_TOKENS, SHAPES, Shape, lengths, longest
from tests.bench.random_models import load_random

# Decodes, and tokens of the prompt that is computed beside them, and of it those that are cached.
BESIDE = ((8, 256, 0), (128, 256, 0), (128, 128, 1024))


def build(shape: Shape, max_num_seqs: int, kv_dtype: Literal["auto", "fp8"] = "auto") -> Engine:
    """An engine with random weights."""
    settings = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_TOKENS,
        max_model_len=longest(shape),
        hands_over=False,
        kv_dtype=kv_dtype,
    )
    return Engine(load_random(shape), settings)


def profile_throughput(
    name: str, shape: Shape, bandwidth: float, kv_dtype: Literal["auto", "fp8"]
) -> dict[str, dict[str, float]]:
    """Seconds of the GPU by kind of kernel, printed: steps with prompts, those with decodes alone, and their floor."""
    engine = build(shape, max_num_seqs=MAX_NUM_SEQS, kv_dtype=kv_dtype)
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
    parser.add_argument("--beside", type=Path, metavar="FILE", help="of tests.bench.gpu_vllm, on the same card")
    parser.add_argument("--profile", action="store_true", help="where the GPU's time goes in the run of 256 requests")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu needs a GPU", file=sys.stderr)
        return 1
    try:
        peer = Peer(options.beside, torch.cuda.get_device_name())
    except ValueError as error:
        parser.error(str(error))
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
            found = measure_model(name, bandwidth, peer, options)
        result["models"][name] = found
        gc.collect()  # an engine's graphs and pool, before the next one sizes its own
        torch.cuda.empty_cache()
    print(json.dumps(result))
    return 0


def _parse_context(value: str) -> tuple[int, int]:
    count, tokens = map(int, value.split("x"))
    return count, tokens


def measure_model(name: str, bandwidth: float, peer: Peer, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model, printed as they come."""
    begun = time.perf_counter()
    try:
        engine = build(SHAPES[name], max_num_seqs=MAX_NUM_SEQS, kv_dtype=options.kv_dtype)
    except (RuntimeError, ValueError) as error:
        print(f"\n{name}: does not start: {_reason(error)}", flush=True)
        return {"failed": _reason(error)}
    print(f"\n{name}: ready in {time.perf_counter() - begun:.1f} s, {engine.limits}", flush=True)
    print(f"{'':24}{peer.name:>12}{'engine':>12}{'ratio':>8}{'floor':>10}")
    table = Table(name, engine, bandwidth, peer, options)
    table.decodes()
    table.steps_with_prompts()
    table.prompts()
    table.throughput()
    return table.found


class Table:
    """The rows of one model.

    Args:
        name: of `SHAPES`.
        engine: of it.
        bandwidth: of a copy, bytes per second.
        peer: what stands beside.
        options: of the command line.

    Attributes:
        found: seconds of each row that was measured, by its kind.
    """

    def __init__(self, name: str, engine: Engine, bandwidth: float, peer: Peer, options: argparse.Namespace) -> None:
        self._name, self._engine, self._bandwidth, self._peer, self._options = name, engine, bandwidth, peer, options
        self._driver = Driver(engine, SHAPES[name].config().vocab_size)
        kinds = ("tpot", "context", "beside", "prefill", "products", "failed")
        self.found: dict[str, Any] = {kind: {} for kind in kinds}

    def decodes(self) -> None:
        """Tokens of so many sequences, behind short prompts and behind those that were asked for."""
        for size in SHAPES[self._name].batch_sizes:
            times = self._repeated(f"token-{size}", partial(time_per_output_token, self._driver, size))
            if times:
                self.found["tpot"][size] = times
                least = self._floor(size, PROMPT_TOKENS + MEASURED_STEPS / 2)
                theirs = self._peer.milliseconds(self._name, "tpot", str(size))
                _print_row(f"token, batch {size}", theirs, times, least)
        repeats = self._options.repeats
        for count, tokens in self._options.contexts:
            row = f"{count}x{tokens}"
            times = self._row(f"context-{row}", partial(times_with_context, self._driver, count, tokens, repeats))
            if times:
                self.found["context"][row] = times
                least = self._floor(count, tokens + repeats * MEASURED_STEPS / 2)
                _print_row(f"token, {count} x {tokens}", None, times, least)

    def steps_with_prompts(self) -> None:
        """Steps in which decodes have a prompt beside them."""
        for num_decodes, tokens, cached in BESIDE:
            label = f"beside-{num_decodes}+{tokens}" + (f"@{cached}" if cached else "")
            times = self._repeated(label, partial(time_beside_prompts, self._driver, num_decodes, tokens, cached))
            if times:
                self.found["beside"][label] = times
                _print_row(f"{num_decodes} tokens + {tokens}" + (f" @ {cached}" if cached else ""), None, times, None)

    def prompts(self) -> None:
        """Prompts alone, and their linear layers alone."""
        for count, tokens in SHAPES[self._name].prompts:
            row = f"{count}x{tokens}"
            times = self._repeated(f"prefill-{row}", partial(prefill, self._driver, count, tokens))
            if times:
                alone = self._row(f"prefill-{row}", partial(products_alone, self._engine, count * tokens))
                self.found["prefill"][row], self.found["products"][row] = times, alone
                theirs = self._peer.milliseconds(self._name, "prefill", row)
                _print_row(f"prefill {count} x {tokens}", theirs, times, statistics.median(alone) if alone else None)

    def throughput(self) -> None:
        """Output tokens per second, and what there could be."""
        rates = self._repeated("tokens/s", partial(throughput, self._driver))
        if not rates:
            return
        self.found["throughput"] = rates
        median, theirs = statistics.median(rates), self._peer.throughput(self._name)
        beside = f"{'':12}{median:12.0f}" if theirs is None else f"{theirs:12.0f}{median:12.0f}{median / theirs:8.2f}"
        print(f"{'output tokens/s':24}{beside}")
        if evenly := self.found["prefill"].get("16x1024"):
            bound = throughput_bound(self._engine, self._bandwidth, 16 * 1024 / statistics.median(evenly))
            self.found["throughput_bound"] = bound
            print(f"{'of a bound of':24}{'':12}{bound:12.0f}{median / bound:8.0%}", flush=True)

    def _floor(self, num_seqs: int, num_tokens: float) -> float:
        return floor(self._engine, num_seqs, self._bandwidth, num_tokens)

    def _repeated(self, label: str, run: Callable[[], float]) -> list[float]:
        return self._row(label, partial(repeated, run, self._options.repeats))

    def _row(self, label: str, run: Callable[[], list[float]]) -> list[float]:
        """All figures of one row; none where it was not asked for, or failed, which is noted and printed."""
        if self._options.rows and label not in self._options.rows:
            return []
        try:
            return run()
        except RuntimeError as error:
            self.found["failed"][label] = _reason(error)
            print(f"{label:24}{_reason(error)}", flush=True)
        self._driver.abort_all()
        return []


def _reason(error: Exception) -> str:
    """One line; being out of memory is called that."""
    first = str(error).splitlines()[0] if str(error) else ""
    name = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{name}: {first}"


def _print_row(label: str, peer_ms: float | None, times: list[float], least: float | None) -> None:
    ours_ms = statistics.median(times) * 1e3
    beside = (
        f"{'':12}{ours_ms:12.2f}{'':8}"
        if peer_ms is None
        else f"{peer_ms:12.2f}{ours_ms:12.2f}{peer_ms / ours_ms:8.2f}"
    )
    end = "" if least is None else f"{least * 1e3:10.2f}"
    print(f"{label:24}{beside}{end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
