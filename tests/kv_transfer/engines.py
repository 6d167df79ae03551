"""An engine actor without a model: chunks of one value, and what the tests must see of its process."""

import os
import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import ray
import torch
from torch import Tensor

from deployments.kv_groups import KVGroup
from deployments.kv_transfer.base import Arrival, Export, TransferConfig, TransferStats
from deployments.kv_transfer.direct import ENGINE_ACTOR_OPTIONS, configure, exports_kv, receives_kv, stats
from deployments.kv_transfer.group import GlooGroup
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.local import Arena
from deployments.messages import ChunkReady, DrawnToken
from tests.kv_transfer.threads import kv_threads

# The value of chunks that are given away before they are complete.
EARLY = -1.0
# For what must happen, also on a busy machine.
PATIENCE_S = 120.0
# Layers at which chunks are cut that come in parts.
CUTS = (1, 3)
# 64 KiB per block.
LAYOUT = KVLayout("test-model", "float32", block_size=16, groups=(KVGroup((0, 1, 2, 3), 2, 64),))


def done(token: DrawnToken | None) -> "Future[DrawnToken | None]":
    """As of a chunk that is complete."""
    completion: Future[DrawnToken | None] = Future()
    completion.set_result(token)
    return completion


@ray.remote(num_cpus=0, **ENGINE_ACTOR_OPTIONS)
class FakeEngine:
    def __init__(self, layout: KVLayout, config: TransferConfig, arena_bytes: int = 0) -> None:
        torch.set_num_threads(1)
        self._arena = Arena(arena_bytes, "cpu")
        configure(layout, config=config, arena=self._arena)
        # By its module, since Ray pickles this class with what it names.
        self._had_manager = ray._private.worker.global_worker._rdt_manager is not None
        self._layout = layout
        self._exported: list[weakref.ref[Tensor]] = []
        self._early: list[Future[DrawnToken | None]] = []
        self._first_token: DrawnToken | None = None
        self._may_go = threading.Event()
        self._is_about_to_move = threading.Event()
        self._is_moving = threading.Event()

    @exports_kv
    def take_chunk(self, num_blocks: int, value: float) -> Export:
        shape = self._layout.chunk_shape(num_blocks)
        chunk = self._arena.allocate(shape, torch.float32)
        chunk = (torch.empty(shape) if chunk is None else chunk).fill_(value)
        # The second half tells a chunk that came in part.
        chunk.view(-1)[chunk.numel() // 2 :] += 0.5
        self._exported.append(weakref.ref(chunk))
        if value != EARLY:
            return Export(chunk, done(None))
        self._early.append(Future())
        return Export(chunk, self._early[-1])

    @ray.method(concurrency_group="ctl")
    def complete(self, token: DrawnToken | None) -> None:
        """Complete the chunks of the value EARLY; None: they never will be."""
        while self._early:
            self._early.pop(0).set_result(token) if token is not None else self._early.pop(0).cancel()

    @exports_kv
    def take_parts(self, num_blocks: int, value: float, is_dropped: bool) -> Export:
        """A chunk in three parts, each complete a little later; or never, from the second on.

        Each layer's value is that of the chunk and its number in tenths.
        """
        shape = self._layout.chunk_shape(num_blocks)
        chunk = self._arena.allocate(shape, torch.float32)
        chunk = torch.empty(shape) if chunk is None else chunk
        chunk.copy_((value + torch.arange(shape[0]) / 10).view(-1, *[1] * (len(shape) - 1)).expand(shape))
        self._exported.append(weakref.ref(chunk))
        *earlier, last = completions = [Future[DrawnToken | None]() for _ in range(len(CUTS) + 1)]

        def complete() -> None:
            for i, completion in enumerate(completions):
                time.sleep(random.uniform(0, 0.01))
                if is_dropped and i:
                    completion.cancel()
                else:
                    completion.set_result(DrawnToken(int(value)) if completion is last else None)

        threading.Thread(target=complete, daemon=True).start()
        return Export(chunk, last, CUTS, tuple(earlier))

    @exports_kv
    def take_wrong_chunk(self) -> Export:
        return Export(torch.zeros(3, 3), done(None))

    @receives_kv
    def receive_kv(self, header: ChunkReady, arrivals: Iterator[Arrival]) -> tuple[float, float, int]:
        arrival, *later = arrivals
        assert later == [], "it comes whole"
        chunk, self._first_token = arrival.tensor, arrival.first_token
        halves = chunk.view(2, -1)
        assert (halves[0] == halves[0, 0]).all() and (halves[1] == halves[1, 0]).all()
        return float(halves[0, 0]), float(halves[1, 0]), chunk.shape[2]

    @receives_kv
    def receive_parts(self, header: ChunkReady, arrivals: Iterator[Arrival]) -> list[Any]:
        """Of each part, as it comes: its layers, the least and the greatest value of each, and the token with it."""
        found = []
        for arrival in arrivals:
            flat = arrival.tensor.flatten(1)
            values = flat.amin(1).tolist(), flat.amax(1).tolist()
            found.append((arrival.layers, *values, arrival.first_token))
            del arrival, flat
        return found

    @ray.method(concurrency_group="ctl")
    def first_token(self) -> DrawnToken | None:
        """What came with the chunk that came last."""
        return self._first_token

    @ray.method(concurrency_group="ctl")
    def had_manager(self) -> bool:
        """Whether Ray's manager of transfers was there once this engine was configured."""
        return self._had_manager

    @ray.method(concurrency_group="ctl")
    def stats(self) -> TransferStats:
        return stats()

    @ray.method(concurrency_group="ctl")
    def num_exported_alive(self) -> int:
        """Chunks produced here whose memory is not freed."""
        return sum(ref() is not None for ref in self._exported)

    @ray.method(concurrency_group="ctl")
    def threads(self) -> list[str]:
        return [thread.name for thread in kv_threads()]

    @ray.method(concurrency_group="ctl")
    def pid(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group="ctl")
    def hold_back(self, direction: str, seconds: float) -> None:
        """From now on wait before each chunk that begins to be sent (`send`) or received (`recv`), as if slow."""
        original: Any = getattr(GlooGroup, f"start_{direction}")

        def slow(group: GlooGroup, tensor: Tensor) -> Any:
            self._is_about_to_move.set()
            self._may_go.wait(seconds)
            wait = original(group, tensor)
            self._is_moving.set()
            return wait

        setattr(GlooGroup, f"start_{direction}", slow)

    @ray.method(concurrency_group="ctl")
    def let_go(self) -> None:
        self._may_go.set()

    @ray.method(concurrency_group="ctl")
    def wait_until_about_to_move(self) -> bool:
        """Wait until a chunk is about to be sent or received here, after `hold_back`."""
        return self._is_about_to_move.wait(PATIENCE_S)

    @ray.method(concurrency_group="ctl")
    def wait_until_moving(self) -> bool:
        """Wait until one is not held back any more, and its bytes are being sent or received."""
        return self._is_moving.wait(PATIENCE_S)
