"""What a cached prefix is worth, by where it is: in this engine, in another one, or in the tier, its engine dead.

Run: `make bench-tier`. Engines of the default model on a Ray of their own, without ingress and fronts. A prompt is a
prefix and a suffix of its own. In each round one engine computes the prefix; then the whole prompt is asked for
everywhere, and its tokens are compared with those of an engine that caches nothing. Hand-offs go to that engine, so
that all of the KV is sent. In the end the engine that computed is killed. Then one engine generates prompts that share
nothing, in short rounds with the tier, without it, and without it once more (`cost.py`). Prints tables and, as its last
line, one JSON object.

With `--shape` the same on GPUs: a shape of `bench-gpu` with random weights in place of the default model. On one GPU
all engines share it, and the hand-off is CUDA IPC within the card. On two GPUs the hand-off goes to the second. Two
engines differ in the last bits of bfloat16 when one has computed a prompt at once and another its last tokens alone,
and random weights make near ties of many tokens.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import Any

import ray
import torch

from app.config import AppConfig
from deployments.engine.config import EngineConfig
from deployments.engine_actor import EngineActor
from deployments.engine_builder import BuiltEngine, EngineBuilder, assemble_engine, build_engine
from deployments.kv_tier.ray_store import counts_of, shards
from deployments.kv_tier.settings import TierSettings
from deployments.kv_transfer import direct
from deployments.messages import GenerateRequest, SamplingParams
from tests.bench.gpu_shapes import SHAPES
from tests.bench.random_models import load_random
from tests.bench.tier.cost import CONTROL, ON, Costs, judge, measure, ratios
from tests.bench.tier.switched import SwitchedActor
from tests.engine_pair import DrivenEngine, hand_over, random_prompt
from tests.waiting import wait_until

VOCAB = 49_000
# A way, and what of the cold TTFT it may take.
ASKED = {"same engine": 0.15, "hand-off": 0.35, "tier": 0.35, "tier, engine killed": 0.35}
ASKED_OF_GPU = {"same engine": 0.15, "hand-off": 0.15, "tier": 0.25, "tier, engine killed": 0.25}
MAX_SLOWDOWN = 0.03
# Of the card, for each of three engines, and of its memory for each one's KV; and of the second card, if there is one.
GPU_SHARE = 0.3
NEIGHBOUR_SHARE = 0.6
GPU_KV_BYTES = 6 << 30
TIMEOUT_S = 600


class Tokens(list[int]):
    """Generated tokens, and the seconds to the first."""

    ttft_s: float


class Bench:
    """Engines, prompts, and what was measured.

    Args:
        args: see `main`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._tier = TierSettings(max_bytes=args.tier_bytes, name=f"bench-{os.getpid()}")
        self._names = count()
        self.ttft_s: dict[str, list[float]] = defaultdict(list)
        self.differing: list[str] = []
        self.costs = Costs()

    @contextmanager
    def engine(self, *, has_tier: bool, caches: bool = True, is_switched: bool = False) -> Iterator[DrivenEngine]:
        """An engine that has computed something, and is gone afterwards.

        Args:
            has_tier: from the start.
            caches: prefixes.
            is_switched: its tier can be turned on later.
        """
        shape = self._args.shape
        build: EngineBuilder = partial(build_random, shape) if shape else build_engine
        is_neighbour = not has_tier and not is_switched and torch.cuda.device_count() > 1
        share = NEIGHBOUR_SHARE if is_neighbour else GPU_SHARE  # two of the others leave no room for it on the first
        options = {"num_cpus": 1.0, "num_gpus": share if shape else 0.0}
        actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(SwitchedActor if is_switched else EngineActor)
        arguments = (self._tier,) if is_switched else (build, self._tier if has_tier else None)
        actor = actor_class.options(**options).remote(self._config(caches), *arguments)
        engine = DrivenEngine(actor)
        self.ask(engine, self.prompt(300))
        try:
            yield engine
        finally:
            ray.kill(actor)

    def _config(self, caches: bool) -> EngineConfig:
        settings: dict[str, Any] = {"enable_prefix_caching": caches, "hands_over": True}
        if self._args.shape:
            longest = self._args.prefix_tokens + self._args.suffix_tokens + 512
            settings |= {"max_num_seqs": 8, "max_model_len": longest, "kv_cache_bytes": GPU_KV_BYTES, "share_kv": True}
            return EngineConfig(**settings, max_num_batched_tokens=16384)
        settings["num_threads"] = self._args.threads
        return AppConfig.model_validate({"engine": settings}).engine_config("prefill")

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """One that shares nothing with others."""
        return random_prompt(num_tokens, next(self._names), VOCAB)

    def ask(self, engine: DrivenEngine, prompt: tuple[int, ...]) -> Tokens:
        """What an engine makes of a prompt by itself."""
        name = f"r{next(self._names)}"
        with engine.inbox.listening(name) as stream:
            begun_s = time.perf_counter()
            ray.get(engine.actor.add.remote(self._request(name, prompt), None, engine.inbox.address))
            arrivals = engine.inbox.take(stream, self._args.answer_tokens).result(TIMEOUT_S)
        tokens = Tokens(arrivals.token_ids)
        tokens.ttft_s = arrivals.times_s[0] - begun_s
        return tokens

    def rounds(self) -> None:
        """All ways to a first token."""
        with (
            self.engine(has_tier=True) as computes,
            self.engine(has_tier=True) as other,
            self.engine(has_tier=False, caches=False) as forgets,
        ):
            self._hand_over(computes, forgets, self.prompt(300))
            for i in range(self._args.warm_up + self._args.rounds):
                if i == self._args.warm_up:
                    self.ttft_s.clear()
                    self.differing.clear()
                prefix = self.prompt(self._args.prefix_tokens)
                prompt = prefix + self.prompt(self._args.suffix_tokens)
                self._note("cold", self.ask(computes, prefix + self.prompt(self._args.suffix_tokens)))
                cold = self.ask(forgets, prompt)
                self._note("cold", cold)
                self._note("hand-off", self._hand_over(computes, forgets, prompt), cold)
                self._note("same engine", self.ask(computes, prompt), cold)
                self._settle()
                time.sleep(self._args.pause)
                self._note("tier", self.ask(other, prompt), cold)
            left = [self.prompt(self._args.prefix_tokens) for _ in range(self._args.rounds)]
            for prefix in left:
                self.ask(computes, prefix + self.prompt(self._args.suffix_tokens))
            self._settle()
            time.sleep(self._args.pause)
            ray.kill(computes.actor)
            for prefix in left:
                prompt = prefix + self.prompt(self._args.suffix_tokens)
                self._note("tier, engine killed", self.ask(other, prompt), self.ask(forgets, prompt))

    def throughput(self) -> None:
        """Prompts that share nothing, with the tier and without it, in turn."""
        with self.engine(has_tier=False, is_switched=True) as engine:
            work = partial(self._generate_many, engine)
            # The index's process has started, and the object store's memory was touched, before anything is timed.
            ray.get(engine.actor.switch.remote(True))
            work()
            self._settle()
            self.costs = measure(engine, work, self._settle, self._args.throughput_rounds)

    def objects(self) -> list[tuple[int, int]]:
        """Objects of each shard and their bytes, once nothing is on its way."""
        self._settle()
        return [(counts.num_objects, counts.num_bytes) for counts in counts_of(self._tier)]

    def end(self) -> list[tuple[int, int]]:
        """Give the tier up; what it holds then."""
        ray.get([shard.clear.remote() for shard in shards(self._tier)])
        left = self.objects()
        shard: Any  # Ray kills by its own type of handle
        for shard in shards(self._tier):
            ray.kill(shard)
        return left

    def _generate_many(self, engine: DrivenEngine) -> None:
        prompts = {f"r{next(self._names)}": self.prompt(self._args.unshared_tokens) for _ in range(self._args.batch)}
        with engine.inbox.listening_to(prompts) as streams:
            for name, prompt in prompts.items():
                request = self._request(name, prompt, self._args.unshared_answer_tokens)
                engine.actor.add.remote(request, None, engine.inbox.address)
            taken = [engine.inbox.take(stream, self._args.unshared_answer_tokens) for stream in streams]
            for one in taken:
                one.result(TIMEOUT_S)

    def _settle(self) -> None:
        """Return when nothing is on its way to the tier."""
        time.sleep(0.3)  # offers are gathered before they are told
        wait_until(partial(_is_settled, self._tier), TIMEOUT_S)

    def _hand_over(self, source: DrivenEngine, target: DrivenEngine, prompt: tuple[int, ...]) -> Tokens:
        found = hand_over(source, target, prompt, f"r{next(self._names)}", self._args.answer_tokens)
        tokens = Tokens(found.token_ids)
        tokens.ttft_s = found.ttft_s
        return tokens

    def _note(self, way: str, tokens: Tokens, expected: Tokens | None = None) -> None:
        self.ttft_s[way].append(tokens.ttft_s)
        print(f"{way}: {tokens.ttft_s:.3f} s", flush=True)
        if expected is not None and tokens != expected:
            self.differing.append(way)

    def _request(self, name: str, prompt: tuple[int, ...], max_tokens: int | None = None) -> GenerateRequest:
        return GenerateRequest(name, prompt, SamplingParams(max_tokens or self._args.answer_tokens, temperature=0))


def _is_settled(tier: TierSettings) -> bool:
    return all(counts.num_pending == 0 for counts in counts_of(tier))


def build_random(shape: str, config: EngineConfig) -> BuiltEngine:
    """An engine with random weights, the same in every process."""
    return assemble_engine(load_random(SHAPES[shape]), config)


def report_ttft(bench: Bench, all_asked: dict[str, float]) -> dict[str, Any]:
    """Print the table of times to a first token; the same as one object."""
    if not bench.ttft_s:
        return {}
    cold_s = statistics.median(bench.ttft_s["cold"])
    ratios = {way: statistics.median(bench.ttft_s[way]) / cold_s for way in all_asked}
    print(f"\n{'TTFT':20} {'median s':>9} {'of cold':>8} {'asked':>6}\n{'cold':20} {cold_s:9.3f}")
    for way, asked in all_asked.items():
        print(f"{way:20} {statistics.median(bench.ttft_s[way]):9.3f} {ratios[way]:8.3f} {asked:6.2f}")
    print(f"tokens differ from cold: {', '.join(bench.differing) or 'never'}")
    return {"ratios": ratios, "differing": bench.differing, "ttft_s": bench.ttft_s}


def report_cost(costs: Costs, args: argparse.Namespace) -> dict[str, Any]:
    """Print what the tier costs those who share nothing; the same as one object."""
    if not costs.load:
        return {}
    tokens = args.batch * (args.unshared_tokens + args.unshared_answer_tokens)
    print(
        f"\n{args.batch} prompts that share nothing, {tokens} tokens; median of {len(costs.load)} rounds, 95% interval"
    )
    found: dict[str, Any] = {"raw": asdict(costs)}
    for what, taken_s in (("time", costs.wall_s), ("CPU seconds", costs.cpu_s)):
        of = ratios(taken_s)
        verdict = judge(of[ON], MAX_SLOWDOWN)
        print(f"{what}: with the tier {of[ON]}, {MAX_SLOWDOWN:.0%} asked: {verdict}; without it again {of[CONTROL]}")
        found[what] = {"verdict": verdict} | {way: asdict(one) for way, one in of.items()}
    for way, threads_s in costs.threads_s.items():
        print(f"CPU seconds, {way}: {', '.join(f'{kind} {seconds:.2f}' for kind, seconds in threads_s.items())}")
    print(f"load {statistics.mean(costs.load):.1f}, this benchmark's included")
    return {"cost": found}


def main() -> int:
    """Measure and print; 1 if some tokens were not those of a cold engine."""
    parser = argparse.ArgumentParser(prog="make bench-tier ARGS=...", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefix-tokens", type=int, default=2000)
    parser.add_argument("--suffix-tokens", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--throughput-rounds", type=int, default=20, help="of three times the same prompts each")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time that share nothing")
    parser.add_argument("--unshared-tokens", type=int, default=256)
    parser.add_argument("--unshared-answer-tokens", type=int, default=16)
    parser.add_argument("--tier-bytes", type=int, default=2 << 30)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine")
    parser.add_argument("--warm-up", type=int, default=0, help="rounds before those that count")
    pause = "seconds until what the tier was given is asked for; a GPU's engines pin its memory meanwhile"
    parser.add_argument("--pause", type=float, default=0.0, help=pause)
    parser.add_argument("--shape", choices=SHAPES, help="of random weights, on a GPU; none: the default model on a CPU")
    args = parser.parse_args()
    if args.shape and not torch.cuda.is_available():
        parser.error("--shape needs a GPU")
    ray.init(
        num_cpus=8,
        num_gpus=torch.cuda.device_count() if args.shape else 0,
        include_dashboard=False,
        log_to_driver=False,
    )
    bench = Bench(args)
    if args.rounds:
        bench.rounds()
    if args.throughput_rounds:
        bench.throughput()
    print(f"in the tier: {bench.objects()}")
    found = (
        report_ttft(bench, ASKED_OF_GPU if args.shape else ASKED)
        | report_cost(bench.costs, args)
        | {"left": bench.end()}
    )
    print(f"left in the tier: {found['left']}")
    ray.shutdown()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "ray": ray.__version__, "python": platform.python_version()}
    print(json.dumps({"commit": commit, "versions": versions, "arguments": vars(args), **found}))
    return 1 if bench.differing else 0


if __name__ == "__main__":
    sys.exit(main())
