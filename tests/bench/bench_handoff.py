"""What a hand-off costs: its seconds beside a plain copy over loopback, and the time to first token it adds.

Run: `make bench-handoff`. Prints a table and, as its last line, one JSON object with every raw number.

Part 1 takes two engine actors and a prompt that the first one has cached, so that its KV is there at once: the
hand-off is from the acceptance of the prompt to the last block in the other engine's pool. The plain copy sends as many
bytes in one piece through a TCP socket on loopback, into a buffer that is there already; the two take turns.

Part 2 runs the application twice on one Ray, disaggregated and colocated, and asks both in turn, over HTTP, idle.

With `--shaped RATE` neither runs: see `shaped_link.py`.
"""

import argparse
import json
import multiprocessing
import platform
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx
import ray
import torch
from ray import serve

from app.config import AppConfig
from app.graph import graph
from deployments.engine_actor import EngineActor
from deployments.kv_transfer import direct
from tests.bench.shaped_link import bench_shaped
from tests.engine_pair import DrivenEngine, hand_over, random_prompt

HANDOFF_TOKENS = (512, 2048, 8000)
TTFT_TOKENS = (256, 2048)
VOCAB = 49_000


def _copy_sink(port: "multiprocessing.Queue[int]", total: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port.put(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            buffer = memoryview(bytearray(total))
            while True:
                received = 0
                while received < total:
                    size = connection.recv_into(buffer[received:])
                    if size == 0:
                        return
                    received += size
                connection.sendall(b"k")


class LoopbackCopy:
    """A plain TCP copy between two processes, buffers ready, connection open."""

    def __init__(self, total: int) -> None:
        context = multiprocessing.get_context("spawn")
        port: multiprocessing.Queue[int] = context.Queue()
        self._process = context.Process(target=_copy_sink, args=(port, total), daemon=True)
        self._process.start()
        self._socket = socket.create_connection(("127.0.0.1", port.get()))
        self._data = torch.rand(total // 4).numpy().tobytes()
        self.seconds()  # faults the pages in

    def seconds(self) -> float:
        started = time.perf_counter()
        self._socket.sendall(self._data)
        assert self._socket.recv(1) == b"k"
        return time.perf_counter() - started

    def close(self) -> None:
        self._socket.close()
        self._process.join()


def bench_transfer(config: AppConfig, num_rounds: int) -> list[dict[str, Any]]:
    actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(EngineActor)
    source, target = (
        DrivenEngine(actor_class.options(num_cpus=1).remote(config.engine_config(pool)))
        for pool in ("prefill", "decode")
    )
    rows = []
    for num_tokens in HANDOFF_TOKENS:
        prompt = random_prompt(num_tokens, num_tokens, VOCAB)
        print(f"computing a prompt of {num_tokens} tokens once ...", flush=True)
        source.generate(prompt, f"warm-{num_tokens}", 1)
        num_bytes = hand_over(source, target, prompt, f"first-{num_tokens}").num_bytes
        copy = LoopbackCopy(num_bytes)
        handoffs, copies = [], []
        for i in range(num_rounds):
            # The target runs without prefix caching: it would keep the prompt, and there would be nothing to send.
            handoffs.append(hand_over(source, target, prompt, f"{num_tokens}-{i}").chunks_s)
            copies.append(copy.seconds())
        copy.close()
        rows.append(
            {
                "tokens": num_tokens,
                "bytes": num_bytes,
                "handoff_s": handoffs,
                "copy_s": copies,
                "ratio": statistics.median(handoffs) / statistics.median(copies),
            }
        )
    return rows


def ttft(client: httpx.Client, route: str, num_tokens: int, seed: int) -> tuple[float, float]:
    """Seconds to the first and to the second token of a fresh prompt."""
    body = {
        "model": "bench",
        "prompt": list(random_prompt(num_tokens, seed, VOCAB)),
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,  # an event per token, also where its text is not complete
    }
    started = time.perf_counter()
    with client.stream("POST", f"{route}/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        times = [time.perf_counter() - started for line in response.iter_lines() if line.startswith("data: {")]
    assert len(times) == 3, "one event per token"
    return times[0], times[1]


def bench_ttft(port: int, num_rounds: int) -> list[dict[str, Any]]:
    serve.start(http_options={"port": port})
    for mode in ("disaggregated", "colocated"):
        print(f"starting the {mode} application ...", flush=True)
        handed_over = {"min_remote_prefill_tokens": 256} if mode == "disaggregated" else {}
        args = AppConfig.model_validate({"mode": mode, "served_model_name": "bench"} | handed_over)
        serve.run(graph(args), name=mode, route_prefix=f"/{mode}")
    rows = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        for num_tokens in TTFT_TOKENS:
            samples: dict[str, list[tuple[float, float]]] = {"disaggregated": [], "colocated": []}
            for i in range(num_rounds + 1):
                for j, (mode, taken) in enumerate(samples.items()):
                    taken += [ttft(client, f"/{mode}", num_tokens, seed=num_tokens * 100 + i * 10 + j)]
                print(
                    f"{num_tokens} tokens, round {i}: " + ", ".join(f"{m} {t[-1][0]:.3f} s" for m, t in samples.items())
                )
            first = {mode: [t for t, _ in taken[1:]] for mode, taken in samples.items()}  # round 0 warms up
            second = {mode: [t for _, t in taken[1:]] for mode, taken in samples.items()}
            median = {mode: statistics.median(values) for mode, values in first.items()}
            rows.append(
                {
                    "tokens": num_tokens,
                    "ttft_s": first,
                    "second_token_s": second,
                    "added_s": median["disaggregated"] - median["colocated"],
                    "added_share": median["disaggregated"] / median["colocated"] - 1,
                    "added_second_token_s": statistics.median(second["disaggregated"])
                    - statistics.median(second["colocated"]),
                }
            )
    serve.shutdown()
    return rows


def commit() -> str:
    """What is measured."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Run both parts and print the report."""
    parser = argparse.ArgumentParser(prog="make bench-handoff ARGS=...", description="What a hand-off costs on a CPU.")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8123, help="of the two applications (default: %(default)s)")
    parser.add_argument("--shaped", metavar="RATE", help="between two hosts over such a link, as `tc` has it; as root")
    parser.add_argument("--lengths", default=",".join(map(str, HANDOFF_TOKENS)), help="of prompts over such a link")
    options = parser.parse_args()
    if options.shaped:
        rows = bench_shaped(options.shaped, options.rounds, list(map(int, options.lengths.split(","))))
        print(json.dumps({"commit": commit(), "rate": options.shaped, "rows": rows}))
        return 0
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    transfers = bench_transfer(
        AppConfig.model_validate({"decode.engine.enable_prefix_caching": "false"}), options.rounds
    )
    ray.shutdown()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    latencies = bench_ttft(options.port, options.rounds)
    ray.shutdown()
    print(f"\n{'tokens':>7} {'MiB':>7} {'hand-off s':>11} {'copy s':>8} {'ratio':>6}")
    for row in transfers:
        handoff, copy = statistics.median(row["handoff_s"]), statistics.median(row["copy_s"])
        print(f"{row['tokens']:>7} {row['bytes'] / 2**20:>7.1f} {handoff:>11.3f} {copy:>8.3f} {row['ratio']:>6.2f}")
    print(f"\n{'tokens':>7} {'TTFT colocated':>15} {'disaggregated':>14} {'added':>9} {'share':>7} {'2nd token':>10}")
    for row in latencies:
        values = (statistics.median(row["ttft_s"][mode]) for mode in ("colocated", "disaggregated"))
        print(
            "{:>7} {:>13.3f} s {:>12.3f} s {:>6.0f} ms {:>6.1%} {:>7.0f} ms".format(
                row["tokens"], *values, row["added_s"] * 1e3, row["added_share"], row["added_second_token_s"] * 1e3
            )
        )
    versions = {"torch": torch.__version__, "ray": ray.__version__, "python": platform.python_version()}
    print(json.dumps({"commit": commit(), "versions": versions, "transfer": transfers, "ttft": latencies}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
