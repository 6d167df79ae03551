"""Engine actors that time their copies into the pool on the GPU's clock, for benchmarks of hand-offs."""

from collections.abc import Sequence
from typing import Any, Literal

import ray
import torch

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine.engine import Engine
from deployments.engine_actor import EngineActor
from deployments.engine_builder import BuiltEngine, EngineBuilder
from deployments.engine_host import EngineHost
from deployments.kv_transfer import direct
from deployments.kv_transfer.base import TransferStats
from deployments.messages import ChunkReady
from tests.bench.bare_copies import nccl_variables
from tests.engine.insides import import_stream_of

# About 2 ms; launching a copy takes one at most.
QUEUEING_CYCLES = 4_000_000


class TimedHost(EngineHost):
    """Notes the time of its copies into the pool, while `looks` is set."""

    looks = False

    def import_chunk(self, chunk: ChunkReady, tensor: torch.Tensor, engine: Engine) -> torch.cuda.Event | None:
        if not self.looks:
            return super().import_chunk(chunk, tensor, engine)
        stream = import_stream_of(engine)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The GPU is kept busy until the copy is queued; else its clock would count the time that launching takes.
        with torch.cuda.stream(stream):
            torch.cuda._sleep(QUEUEING_CYCLES)
            begin.record()
        imported = super().import_chunk(chunk, tensor, engine)
        end.record(stream)
        self.copies.append((tensor.nbytes, begin, end))
        return imported

    def look(self) -> None:
        self.copies: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self.looks = True


class TimedEngine(EngineActor):
    """Also says how long its copies into the pool take on the GPU's clock, while it is asked to look."""

    def __init__(self, config: EngineConfig, build: EngineBuilder) -> None:
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


def config_of(
    rank: int,
    share_kv: bool,
    max_num_batched_tokens: int,
    num_parts: int,
    method: Literal["off", "ngram"] = "off",
) -> EngineConfig:
    """Of an engine with room for the KV of two of the longest prompts."""
    return EngineConfig(
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=32768,
        kv_cache_bytes=9 << 30,
        enable_prefix_caching=rank == 0,  # so that the prefill engine can hand over what it has computed before
        share_kv=share_kv,
        handoff_layer_parts=num_parts,
        speculation=SpeculationConfig(method=method),
    )


def start(rank: int, config: EngineConfig, build: EngineBuilder, num_gpus: float, *, sockets: bool = False) -> Any:
    """An engine in a process of its own.

    Args:
        rank: among those that hand KV to one another.
        config: of the engine.
        build: makes it.
        num_gpus: that Ray counts for it.
        sockets: over NCCL, see `nccl_variables`; so it must be where another engine is on the same GPU.
    """
    actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(TimedEngine)
    env = {"env_vars": nccl_variables(rank, sockets=sockets)}
    options = {"num_cpus": 1, "num_gpus": num_gpus, "runtime_env": env}
    return actor_class.options(**options).remote(config, build)


def moved_s(copies: Sequence[tuple[int, float]], num_copied: int, received_s: float, num_received: int) -> float:
    """Seconds that the bytes of one hand-off take into the pool by themselves.

    Args:
        copies: bytes and seconds of each, of so many hand-offs alike.
        num_copied: those hand-offs.
        received_s: that receiving took, of so many hand-offs; 0: the memory is read as it is.
        num_received: those.
    """
    each = len(copies) // num_copied
    # A chunk that is received is copied while the next one is: only the copy of the last one is behind that.
    counted = copies[each - 1 :: each] if received_s else copies
    return sum(seconds for _, seconds in counted) / num_copied + received_s / num_received
