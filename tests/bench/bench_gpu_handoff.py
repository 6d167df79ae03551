"""What a hand-off costs on GPUs: two engine actors with the shape of Llama-3.1-8B, random weights, bfloat16.

Run: `make bench-gpu-handoff` on a machine with a GPU, or two: then each engine has its own. Each way, memory that
both processes map (CUDA IPC) and NCCL, hands over prompts of several lengths and checks the tokens against the
decode engine alone. On one GPU NCCL talks over loopback sockets, since it knows no two ranks of one GPU: a figure of
sockets. On two, `ncclSend` and `cudaMemcpyPeer` of as many bytes are measured as well. Prints tables and, as its last
line, one JSON object with every raw number.

"Alone" is a hand-off of KV that the prefill engine holds already, from the first chunk announced to the last block in
the other engine's pool; "behind" is what is left of it when the first token is there, if the prompt is computed
meanwhile; the rest was hidden. "GiB/s" is that of the bytes' own way into the pool: copies on the GPU's clock; over
NCCL the receiving, from the source's word that a chunk is complete to its last byte, and the copy of the last chunk.

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
from deployments.engine.engine import Engine
from deployments.engine_actor import EngineActor
from deployments.engine_builder import BuiltEngine, assemble_engine
from deployments.engine_host import EngineHost
from deployments.kv_groups import KV_FORMS, KVGroup, bytes_per_block
from deployments.kv_transfer import direct
from deployments.kv_transfer.base import TransferStats
from deployments.messages import ChunkReady
from tests.bench.bare_copies import memcpy_peer_s, nccl_send_s
from tests.bench.bench_gpu import load_random
from tests.bench.gpu_shapes import SHAPES
from tests.engine_pair import DrivenEngine, hand_over, random_prompt

LENGTHS = (512, 2048, 8000, 32000)
NUM_TOKENS = 16
MODEL = "llama-8b"
VOCAB_SIZE = SHAPES[MODEL].config().vocab_size


# About 2 ms; launching a copy takes one at most.
QUEUEING_CYCLES = 4_000_000
REST_S = 0.3


class TimedHost(EngineHost):
    """Notes the time of its copies into the pool, while `looks` is set."""

    looks = False

    def import_chunk(self, chunk: ChunkReady, tensor: torch.Tensor, engine: Engine) -> torch.cuda.Event | None:
        if not self.looks:
            return super().import_chunk(chunk, tensor, engine)
        # The GPU is kept busy until the copy is queued; else its clock would count the time that launching takes.
        torch.cuda._sleep(QUEUEING_CYCLES)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        imported = super().import_chunk(chunk, tensor, engine)
        end.record()
        self.copies.append((tensor.nbytes, begin, end))
        return imported

    def look(self) -> None:
        self.copies: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self.looks = True


class TimedEngine(EngineActor):
    """Also says how long its copies into the pool take on the GPU's clock, while it is asked to look."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, build)

    def build_host(self, built: BuiltEngine) -> TimedHost:
        self._timed = TimedHost(built, self._events.put)
        return self._timed

    @ray.method(concurrency_group="ctl")
    def look(self) -> None:
        """From now on time the copies; hand-offs take longer for it."""
        self._timed.look()

    @ray.method(concurrency_group="ctl")
    def copies(self) -> list[tuple[int, float]]:
        """Bytes and seconds of each copy since `look`, which this ends."""
        self._timed.looks = False
        return [(nbytes, begin.elapsed_time(end) / 1e3) for nbytes, begin, end in self._timed.copies]

    @ray.method(concurrency_group="ctl")
    def transfer_stats(self) -> TransferStats:
        return direct.stats()


def build(config: EngineConfig) -> BuiltEngine:
    """An engine with random weights, the same in every process."""
    return assemble_engine(load_random(SHAPES[MODEL]), config)


def start(rank: int, share_kv: bool, max_num_batched_tokens: int, num_gpus: float, num_parts: int) -> Any:
    """An engine in a process of its own, with room for the KV of two of the longest prompts."""
    config = EngineConfig(
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=32768,
        kv_cache_bytes=9 << 30,
        enable_prefix_caching=rank == 0,  # so that the prefill engine can hand over what it has computed before
        share_kv=share_kv,
        handoff_layer_parts=num_parts,
    )
    env = {"NCCL_NVLS_ENABLE": "0"}  # multicast needs rights that lent machines do not give
    if num_gpus < 1:
        env |= {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(TimedEngine)
    options = {"num_cpus": 1, "num_gpus": num_gpus, "runtime_env": {"env_vars": env}}
    return actor_class.options(**options).remote(config)


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
        # A chunk that is received is copied while the next one is: only the copy of the last one is behind that.
        counted = copies[len(copies) // rounds - 1 :: len(copies) // rounds] if received_s else copies
        moved_s = sum(seconds for _, seconds in counted) / rounds + received_s / (2 * rounds)
        median = {name: statistics.median(r[name] for r in found) for name in found[0]}
        print(
            f"{way:>9} {num_parts:>6} {length:>7} {handed.num_bytes / 2**20:>8.0f} {median['prefill_s'] * 1e3:>11.1f}"
            f" {median['ttft_s'] * 1e3:>9.1f} {median['ttft_s'] / median['prefill_s'] - 1:>+6.1%}"
            f" {median['alone_s'] * 1e3:>9.1f} {median['behind_s'] * 1e3:>10.1f}"
            f" {1 - median['behind_s'] / median['alone_s']:>7.0%}"
            f" {handed.num_bytes / moved_s / 2**30:>7.1f}"
            f"  {'equal' if all(r['equal'] for r in found) else 'DIFFERENT'}",
            flush=True,
        )
    return rows


def measure_bare(lengths: list[int]) -> dict[str, dict[int, float]]:
    """Seconds of `ncclSend` and `cudaMemcpyPeer` for the KV of so many tokens, printed as GiB/s."""
    config = SHAPES[MODEL].config()
    head_dim = config.hidden_size // config.num_attention_heads
    group = KVGroup(tuple(range(config.num_hidden_layers)), config.num_key_value_heads, head_dim)
    num_bytes = bytes_per_block((group,), 256, KV_FORMS["bfloat16"])
    sizes = [-(-length // 256) * num_bytes for length in lengths]
    found = {"ncclSend": nccl_send_s(sizes), "cudaMemcpyPeer": {size: memcpy_peer_s(size) for size in sizes}}
    for name, seconds in found.items():
        rates = ", ".join(f"{size / 2**20:.0f} MiB {size / s / 2**30:.1f}" for size, s in seconds.items())
        print(f"{name}, GiB/s: {rates}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-gpu-handoff ARGS=...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--ways", default="cuda_ipc,nccl")
    parser.add_argument("--parts", default="1", help="of layers; several, one after the other (default: %(default)s)")
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
    bare = measure_bare(list(map(int, options.lengths.split(",")))) if num_gpus > 1 else {}
    print(
        f"{'':>9} {'parts':>6} {'tokens':>7} {'MiB':>8} {'prefill ms':>11} {'TTFT ms':>9} {'':>6} {'alone ms':>9}"
        f" {'behind ms':>10} {'hidden':>7} {'GiB/s':>7}"
    )
    for way, num_parts in product(options.ways.split(","), map(int, options.parts.split(","))):
        share = 0.4 if num_gpus == 1 else 1
        actors = [start(rank, way == "cuda_ipc", options.steps, share, num_parts) for rank in (0, 1)]
        source, target = map(DrivenEngine, actors)
        lengths = [int(length) for length in options.lengths.split(",")]
        rows += measure(way, num_parts, source, target, lengths, options.rounds)
        stats = ray.get(target.actor.stats.remote())
        assert stats.num_used_blocks == 0, stats
        for engine in (source, target):
            ray.kill(engine.actor)
        time.sleep(2)  # the GPU's memory, before the next two size theirs
    ray.shutdown()
    result = {"device": torch.cuda.get_device_name(), "num_gpus": num_gpus, "steps": options.steps, "bare": bare}
    print(json.dumps(result | {"rows": rows}))
    return 0 if all(r["equal"] for row in rows for r in row["rounds"]) else 1


if __name__ == "__main__":
    sys.exit(main())
