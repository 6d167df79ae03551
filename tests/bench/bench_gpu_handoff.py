"""What a hand-off costs on GPUs: two engine actors with the shape of Llama-3.1-8B, random weights, bfloat16.

Run: `make bench-gpu-handoff` on a machine with a GPU, or two: then each engine has its own. Each way, memory that
both processes map (CUDA IPC) and NCCL, hands over prompts of several lengths and checks the tokens against the
decode engine alone. On one GPU NCCL talks over loopback sockets, since it knows no two ranks of one GPU: a figure of
sockets. Prints a table and, as its last line, one JSON object with every raw number.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import ray
import torch

from deployments.engine.config import EngineConfig
from deployments.engine_actor import BuiltEngine, EngineActor, assemble_engine
from deployments.kv_transfer import direct
from tests.bench.bench_gpu import load_random, shapes
from tests.engine_pair import DrivenEngine, hand_over, random_prompt

LENGTHS = (512, 2048, 8000, 32000)
NUM_TOKENS = 16
MODEL = "llama-8b"
VOCAB_SIZE = shapes()[MODEL].vocab_size


def build(config: EngineConfig) -> BuiltEngine:
    """An engine with random weights, the same in every process."""
    return assemble_engine(load_random(shapes()[MODEL]), config)


def start(rank: int, share_kv: bool, max_num_batched_tokens: int, num_gpus: float) -> DrivenEngine:
    """An engine in a process of its own, with room for the KV of two of the longest prompts."""
    config = EngineConfig(
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=32768,
        kv_cache_bytes=9 << 30,
        enable_prefix_caching=False,
        share_kv=share_kv,
    )
    env = {"NCCL_NVLS_ENABLE": "0"}  # multicast needs rights that lent machines do not give
    if num_gpus < 1:
        env |= {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(EngineActor)
    options = {"num_cpus": 1, "num_gpus": num_gpus, "runtime_env": {"env_vars": env}}
    return DrivenEngine(actor_class.options(**options).remote(config, build))


def measure(
    way: str, source: DrivenEngine, target: DrivenEngine, lengths: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Rows of the table, printed as they come."""
    rows = []
    for length in lengths:
        prompt = random_prompt(length, seed=length, vocab_size=VOCAB_SIZE)
        alone = target.generate(prompt, f"alone-{length}", NUM_TOKENS)
        hand_over(source, target, prompt, f"warm-{length}")
        found = []
        for i in range(rounds):
            begun = time.perf_counter()
            source.generate(prompt, f"prefill-{length}-{i}", 1)
            prefill_s = time.perf_counter() - begun
            handed = hand_over(source, target, prompt, f"{length}-{i}", NUM_TOKENS)
            found.append(
                {
                    "prefill_s": prefill_s,
                    "ttft_s": handed.ttft_s,
                    "chunks_s": handed.chunks_s,
                    "behind_s": handed.behind_s,
                    "equal": handed.token_ids == alone,
                }
            )
        row = {"way": way, "tokens": length, "bytes": handed.num_bytes, "rounds": found}
        rows.append(row)
        median = {name: statistics.median(r[name] for r in found) for name in found[0]}
        print(
            f"{way:>9} {length:>7} {handed.num_bytes / 2**20:>8.0f} {median['prefill_s'] * 1e3:>11.1f}"
            f" {median['ttft_s'] * 1e3:>9.1f} {median['chunks_s'] * 1e3:>10.1f} {median['behind_s'] * 1e3:>10.1f}"
            f"  {'equal' if all(r['equal'] for r in found) else 'DIFFERENT'}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-gpu-handoff ARGS=...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--ways", default="cuda_ipc,nccl")
    parser.add_argument(
        "--steps", type=int, default=8192, help="token budget of both engines, so that they compute alike"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu-handoff needs a GPU", file=sys.stderr)
        return 1
    num_gpus = min(2, torch.cuda.device_count())
    ray.init(num_cpus=8, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False)
    rows = []
    print(f"{num_gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, ray {ray.__version__}")
    print(f"{'':>9} {'tokens':>7} {'MiB':>8} {'prefill ms':>11} {'TTFT ms':>9} {'chunks ms':>10} {'behind ms':>10}")
    for way in options.ways.split(","):
        share = 0.4 if num_gpus == 1 else 1
        source = start(0, way == "cuda_ipc", options.steps, share)
        target = start(1, way == "cuda_ipc", options.steps, share)
        rows += measure(way, source, target, [int(length) for length in options.lengths.split(",")], options.rounds)
        stats = ray.get(target.actor.stats.remote())
        assert stats.num_used_blocks == 0, stats
        for engine in (source, target):
            ray.kill(engine.actor)
        time.sleep(2)  # the GPU's memory, before the next two size theirs
    ray.shutdown()
    print(json.dumps({"device": torch.cuda.get_device_name(), "num_gpus": num_gpus, "rows": rows}))
    return 0 if all(r["equal"] for row in rows for r in row["rounds"]) else 1


if __name__ == "__main__":
    sys.exit(main())
