"""An engine actor without a model: chunks of one value, and what the tests must see of its process."""

import os
import random
import threading
import time
import weakref
from itertools import count
from typing import Any

import ray
import torch
from torch import Tensor

from deployments.engine.handoff.outbox import Outbox, TakenHandoff
from deployments.kv_groups import KVGroup
from deployments.kv_transfer.base import Arrivals, TransferConfig, TransferStats
from deployments.kv_transfer.direct import ENGINE_ACTOR_OPTIONS, configure, exports_kv, receives_kv, stats
from deployments.kv_transfer.group import GlooGroup
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.local import Arena
from deployments.messages import ChunkReady, DrawnToken
from tests.kv_transfer.threads import kv_threads

# The value of chunks that are complete when a test says so.
EARLY = -1.0
# For what must happen, also on a busy machine.
PATIENCE_S = 120.0
# Layers at which chunks are cut that come in parts.
CUTS = (1, 3)
# 64 KiB per block.
LAYOUT = KVLayout("test-model", "float32", block_size=16, groups=(KVGroup((0, 1, 2, 3), 2, 64),))


@ray.remote(num_cpus=0, **ENGINE_ACTOR_OPTIONS)
class FakeEngine:
    def __init__(self, layout: KVLayout, config: TransferConfig, arena_bytes: int = 0) -> None:
        torch.set_num_threads(1)
        self._arena = Arena(arena_bytes, "cpu") if arena_bytes else None
        configure(layout, config=config, arena=self._arena)
        # By its module, since Ray pickles this class with what it names.
        self._had_manager = ray._private.worker.global_worker._rdt_manager is not None
        self._layout = layout
        self._outbox = Outbox(10**9, lease_s=1e9)
        self._names = map(str, count())
        self._exported: list[weakref.ref[Tensor]] = []
        self._early: list[tuple[str, ChunkReady]] = []
        self._first_token: DrawnToken | None = None
        self._may_go = threading.Event()
        self._is_about_to_move = threading.Event()
        self._is_moving = threading.Event()

    @exports_kv
    def take_handoff(self, num_blocks: int, value: float) -> TakenHandoff:
        """Of one chunk."""
        return self._take([(num_blocks, value)])

    @exports_kv
    def take_chunks(self, chunks: list[tuple[int, float]]) -> TakenHandoff:
        """Of several, each complete a little later."""
        return self._take(chunks, is_slow=True)

    def _take(self, chunks: list[tuple[int, float]], is_slow: bool = False) -> TakenHandoff:
        name = next(self._names)
        self._outbox.open(name, 0)
        handoff = self._outbox.take(name)
        assert handoff is not None

        def compute() -> None:
            for i, (num_blocks, value) in enumerate(chunks):
                if is_slow:
                    time.sleep(random.uniform(0, 0.01))
                chunk = self._allocate(num_blocks).fill_(value)
                # The second half tells a chunk that came in part.
                chunk.view(-1)[chunk.numel() // 2 :] += 0.5
                ready = self._outbox.put(name, num_blocks, chunk, is_last=i == len(chunks) - 1)
                if value == EARLY:
                    self._early.append((name, ready))
                else:
                    self._complete(name, ready, DrawnToken(0))

        if is_slow:
            threading.Thread(target=compute, daemon=True).start()
        else:
            compute()
        return handoff

    def _allocate(self, num_blocks: int) -> Tensor:
        shape = self._layout.chunk_shape(num_blocks)
        chunk = None if self._arena is None else self._arena.allocate(shape, torch.float32)
        chunk = torch.empty(shape) if chunk is None else chunk
        self._exported.append(weakref.ref(chunk))
        return chunk

    def _complete(self, name: str, ready: ChunkReady, token: DrawnToken) -> None:
        self._outbox.note_copied(name, ready.index)
        if ready.is_last:
            self._outbox.set_first_token(name, token)

    @ray.method(concurrency_group="ctl")
    def complete(self, token: DrawnToken | None) -> None:
        """Complete the chunks of the value EARLY; None: they never will be."""
        while self._early:
            name, ready = self._early.pop(0)
            if token is None:
                self._outbox.drop(name)
            else:
                self._complete(name, ready, token)

    @exports_kv
    def take_parts(self, num_blocks: int, value: float, is_dropped: bool) -> TakenHandoff:
        """A chunk in three parts, each complete a little later; or never, from the second on.

        Each layer's value is that of the chunk and its number in tenths.
        """
        name, chunk = next(self._names), self._allocate(num_blocks)
        chunk.copy_((value + torch.arange(len(chunk)) / 10).view(-1, *[1] * (chunk.dim() - 1)).expand(chunk.shape))
        self._outbox.open(name, 0)
        handoff = self._outbox.take(name)
        assert handoff is not None
        ready = self._outbox.put(name, num_blocks, chunk, is_last=True, cuts=CUTS)

        def complete() -> None:
            for i in range(len(CUTS) + 1):
                time.sleep(random.uniform(0, 0.01))
                if is_dropped and i:
                    self._outbox.drop(name)
                else:
                    self._outbox.note_copied(name, ready.index)
            if not is_dropped:
                self._outbox.set_first_token(name, DrawnToken(int(value)))

        threading.Thread(target=complete, daemon=True).start()
        return handoff

    @exports_kv
    def take_wrong_handoff(self) -> TakenHandoff:
        name = next(self._names)
        self._outbox.open(name, 0)
        handoff = self._outbox.take(name)
        assert handoff is not None
        self._complete(name, self._outbox.put(name, 1, torch.zeros(3, 3), is_last=True), DrawnToken(0))
        return handoff

    @receives_kv
    def receive_kv(self, header: str, arrivals: Arrivals) -> list[tuple[float, float, int]]:
        """Of each chunk, the values of its halves, and its blocks."""
        found = []
        for arrival in arrivals:
            assert arrival.num_parts == 1, "it comes whole"
            self._first_token, halves = arrival.chunk.first_token, arrival.tensor.view(2, -1)
            assert (halves[0] == halves[0, 0]).all() and (halves[1] == halves[1, 0]).all()
            found.append((float(halves[0, 0]), float(halves[1, 0]), arrival.tensor.shape[2]))
            arrivals.release(arrival.chunk.index)
            del arrival, halves
        return found

    @receives_kv
    def receive_parts(self, header: str, arrivals: Arrivals) -> list[Any]:
        """Of each part, as it comes: its layers, the least and the greatest value of each, and the token with it."""
        found = []
        for arrival in arrivals:
            flat = arrival.tensor.flatten(1)
            values = flat.amin(1).tolist(), flat.amax(1).tolist()
            found.append((arrival.chunk.layers, *values, arrival.chunk.first_token))
            if len(found) == arrival.num_parts:
                arrivals.release(arrival.chunk.index)
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
