"""What a hand-off costs on GPUs: two engine actors with the shape of Llama-3.1-8B, random weights, bfloat16.

Run: `make bench-gpu-handoff` on a machine with a GPU, or two: then each engine has its own. Each way, memory that
both processes map (CUDA IPC) and NCCL, hands over prompts of several lengths and checks the tokens against the
decode engine alone. `ncclSend` of as many bytes is measured as well, and between two GPUs `cudaMemcpyPeer`. On one GPU
NCCL talks over loopback sockets, since it knows no two ranks of one GPU; `--sockets` has it do so on two: what is left
of a link without NVLink, shared memory or InfiniBand. Prints tables and, as its last line, one JSON object with every
raw number.

"Alone" is a hand-off of KV that the prefill engine holds already, from the acceptance of the prompt to the last block
in the other engine's pool; "behind" is what is left of it when the first token is there, if the prompt is computed
meanwhile; the rest was hidden. "GiB/s" is that of the bytes' own way into the pool: copies on the GPU's clock; over
NCCL the receiving, from the source's word that a chunk is complete to its last byte, and the copy of the last chunk.

`--speculation ngram` compares two decode engines instead, one that guesses and one that does not: `guessed_handoff`.

`--parts 1,4` does all of it twice, with other engines: what the last step of a prompt computes goes whole, and in four
parts of some layers each, see `EngineConfig.handoff_layer_parts`.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import product
from typing import Any

import ray
import torch

from deployments.engine.config import EngineConfig
from deployments.engine_builder import BuiltEngine, assemble_engine
from deployments.kv_groups import KV_FORMS, KVGroup, bytes_per_block
from deployments.kv_transfer.base import TransferStats
from tests.bench.bare_copies import memcpy_peer_s, nccl_send_s
from tests.bench.gpu_shapes import SHAPES
from tests.bench.guessed_handoff import bench_guesses
from tests.bench.random_models import load_random
from tests.bench.timed_engines import config_of, moved_s, start
from tests.engine_pair import DrivenEngine, hand_over, random_prompt

LENGTHS = (512, 2048, 8000, 32000)
NUM_TOKENS = 16
MODEL = "llama-8b"
VOCAB_SIZE = SHAPES[MODEL].config().vocab_size
REST_S = 0.3


def build(config: EngineConfig) -> BuiltEngine:
    """An engine with random weights, the same in every process."""
    return assemble_engine(load_random(SHAPES[MODEL]), config)


def time_alone(source: DrivenEngine, prompt: tuple[int, ...], name: str) -> float:
    """Seconds to the first token of a prompt that is not handed over."""
    time.sleep(REST_S)
    begun = time.perf_counter()
    source.generate(prompt, name, 1)
    return time.perf_counter() - begun


def measure(
    way: str, num_parts: int, source: DrivenEngine, target: DrivenEngine, lengths: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Rows of the table, printed as they come."""
    rows = []
    for length in lengths:
        hand_over(source, target, random_prompt(length, length, VOCAB_SIZE), f"warm-{length}")
        found = []
        before: TransferStats = ray.get(target.actor.transfer_stats.remote())
        for i in range(rounds):
            prompt, other = (random_prompt(length, length + 100_003 * (2 * i + j), VOCAB_SIZE) for j in (1, 2))
            # Either goes first in turn, on a GPU that has rested: one that is busy lowers its clock within 0.1 s.
            prefill_s = time_alone(source, other, f"prefill-{length}-{i}") if i % 2 else 0.0
            time.sleep(REST_S)
            handed = hand_over(source, target, prompt, f"{length}-{i}", NUM_TOKENS)
            prefill_s = prefill_s or time_alone(source, other, f"prefill-{length}-{i}")
            again = hand_over(source, target, prompt, f"again-{length}-{i}", NUM_TOKENS)
            expected = target.generate(prompt, f"target-{length}-{i}", NUM_TOKENS)
            found.append(
                {
                    "prefill_s": prefill_s,
                    "ttft_s": handed.ttft_s,
                    "alone_s": again.chunks_s,
                    "behind_s": handed.behind_s,
                    "equal": handed.token_ids == expected,
                }
            )
        after: TransferStats = ray.get(target.actor.transfer_stats.remote())
        ray.get(target.actor.look.remote())
        for i in range(rounds):
            prompt = random_prompt(length, length + 100_003 * (2 * i + 1), VOCAB_SIZE)
            hand_over(source, target, prompt, f"look-{length}-{i}")
        copies = ray.get(target.actor.copies.remote())
        received_s = after.receive_s - before.receive_s
        row = {
            "way": way,
            "parts": num_parts,
            "tokens": length,
            "bytes": handed.num_bytes,
            "rounds": found,
            "copies": copies,
        }
        rows.append(row | {"received_s": received_s})
        seconds = moved_s(copies, rounds, received_s, 2 * rounds)
        median = {name: statistics.median(r[name] for r in found) for name in found[0]}
        print(
            f"{way:>9} {num_parts:>6} {length:>7} {handed.num_bytes / 2**20:>8.0f} {median['prefill_s'] * 1e3:>11.1f}"
            f" {median['ttft_s'] * 1e3:>9.1f} {median['ttft_s'] / median['prefill_s'] - 1:>+6.1%}"
            f" {median['alone_s'] * 1e3:>9.1f} {median['behind_s'] * 1e3:>10.1f}"
            f" {1 - median['behind_s'] / median['alone_s']:>7.0%}"
            f" {handed.num_bytes / seconds / 2**30:>7.1f}"
            f"  {'equal' if all(r['equal'] for r in found) else 'DIFFERENT'}",
            flush=True,
        )
    return rows


def measure_bare(lengths: list[int], num_gpus: int, *, sockets: bool) -> dict[str, dict[int, float]]:
    """Seconds of `ncclSend`, and between GPUs `cudaMemcpyPeer`, for the KV of so many tokens, printed as GiB/s."""
    config = SHAPES[MODEL].config()
    head_dim = config.hidden_size // config.num_attention_heads
    group = KVGroup(tuple(range(config.num_hidden_layers)), config.num_key_value_heads, head_dim)
    num_bytes = bytes_per_block((group,), 256, KV_FORMS["bfloat16"])
    sizes = [-(-length // 256) * num_bytes for length in lengths]
    found = {"ncclSend": nccl_send_s(sizes, share_of_gpu(num_gpus), sockets=sockets)}
    if num_gpus > 1:
        found["cudaMemcpyPeer"] = {size: memcpy_peer_s(size) for size in sizes}
    for name, seconds in found.items():
        rates = ", ".join(f"{size / 2**20:.0f} MiB {size / s / 2**30:.1f}" for size, s in seconds.items())
        print(f"{name}, GiB/s: {rates}", flush=True)
    return found


def share_of_gpu(num_gpus: int) -> float:
    """That each of two processes asks Ray for."""
    return 0.4 if num_gpus == 1 else 1


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """What is to be measured; None: as the command line says."""
    parser = argparse.ArgumentParser(prog="make bench-gpu-handoff ARGS=...")
    parser.add_argument("--rounds", type=int, help="of each length (default: 5; with --speculation 6)")
    parser.add_argument(
        "--lengths", type=_numbers, help=f"of prompts (default: {LENGTHS}, with --speculation up to 8000)"
    )
    parser.add_argument("--ways", type=_words, help="default: cuda_ipc,nccl; with --speculation one, cuda_ipc")
    parser.add_argument(
        "--parts", type=_numbers, default=(1,), help="of layers; several, one after the other (default: 1)"
    )
    parser.add_argument("--sockets", action="store_true", help="NCCL over loopback sockets on two GPUs as on one")
    parser.add_argument(
        "--steps", type=int, default=8192, help="token budget of all engines, so that they compute alike"
    )
    parser.add_argument(
        "--speculation", choices=("ngram",), help="compare decode engines with and without such guesses"
    )
    parser.add_argument(
        "--answers", type=int, default=3, help="with --speculation: long answers to prompts of each length"
    )
    parser.add_argument("--shape", choices=(MODEL, "tiny"), default=MODEL, help="with --speculation: tiny runs on CPUs")
    options = parser.parse_args(arguments)
    if options.speculation and (len(options.ways or "1") > 1 or len(options.parts) > 1):
        parser.error("--speculation takes one of --ways and of --parts")
    if options.shape == "tiny" and not options.speculation:
        parser.error("--shape tiny takes effect with --speculation alone")
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main() -> int:
    options = read_arguments()
    if options.shape != "tiny" and not torch.cuda.is_available():
        print("bench-gpu-handoff needs a GPU", file=sys.stderr)
        return 1
    return bench_guesses(options) if options.speculation else bench_ways(options)


def bench_ways(options: argparse.Namespace) -> int:
    """Each way the KV may go, and each number of parts."""
    num_gpus = min(2, torch.cuda.device_count())
    ray.init(num_cpus=8, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False)
    lengths, rounds = options.lengths or LENGTHS, options.rounds or 5
    rows = []
    print(f"{num_gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, ray {ray.__version__}")
    sockets = options.sockets or num_gpus == 1
    bare = measure_bare(list(lengths), num_gpus, sockets=sockets)
    print(
        f"{'':>9} {'parts':>6} {'tokens':>7} {'MiB':>8} {'prefill ms':>11} {'TTFT ms':>9} {'':>6} {'alone ms':>9}"
        f" {'behind ms':>10} {'hidden':>7} {'GiB/s':>7}"
    )
    for way, num_parts in product(options.ways or ("cuda_ipc", "nccl"), options.parts):
        configs = (config_of(rank, way == "cuda_ipc", options.steps, num_parts) for rank in (0, 1))
        actors = [
            start(rank, config, build, share_of_gpu(num_gpus), sockets=sockets) for rank, config in enumerate(configs)
        ]
        source, target = map(DrivenEngine, actors)
        rows += measure(way, num_parts, source, target, list(lengths), rounds)
        stats = ray.get(target.actor.stats.remote())
        assert stats.num_used_blocks == 0, stats
        for engine in (source, target):
            ray.kill(engine.actor)
        time.sleep(2)  # the GPU's memory, before the next two size theirs
    ray.shutdown()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "num_gpus": num_gpus, "sockets": sockets}
    result |= {"steps": options.steps, "bare": bare}
    print(json.dumps(result | {"rows": rows}))
    return 0 if all(r["equal"] for row in rows for r in row["rounds"]) else 1


if __name__ == "__main__":
    sys.exit(main())
