"""Carries a storm out: kills, stops, scales and leaves, as planned, and times how long each pool takes to come back.

Faults that cost a pool a replica wait for each other, pool by pool; all others come when they are due.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import psutil

from tests.bench.chaos.cluster import Cluster
from tests.bench.chaos.load import Client
from tests.bench.chaos.probes import Call, Deck
from tests.bench.chaos.storm import ENGINE_POOLS, Done, Fault, Kind, Pool

# Pools were whole again 13 to 29 s after a kill and 60 s after a stop of 34 s (two busy cores, 2026-11-27).
RECOVERY_TIMEOUT_S = 180.0
# Serve may find out only now that a replica is to go; then it was not yet back.
_STEADY_S = 3.0
_POLL_S = 0.5
# How long a delay waits for a prompt that it can delay, and how long after its sending the prompt is under way.
_PROMPT_TIMEOUT_S = 5.0
_UNDER_WAY_S = 0.2
_NO_VICTIM = "no healthy replica to hit"
_KILLS = (Kind.ENGINE_KILL, Kind.REPLICA_KILL, Kind.INGRESS_KILL)


class Storm:
    """One storm over one service.

    Args:
        cluster: the service.
        client: the load on it; clients that leave are sent by it too.
        deck: what those ask for.
    """

    def __init__(self, cluster: Cluster, client: Client, deck: Deck) -> None:
        self._cluster = cluster
        self._client = client
        self._deck = deck
        self._locks: dict[Pool | None, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._begun_s = 0.0
        self.done: list[Done] = []

    async def run(self, plan: Sequence[Fault]) -> None:
        """Carry out a plan; returns when every pool is back from its last fault."""
        self._begun_s = time.monotonic()
        async with asyncio.TaskGroup() as faults:
            for fault in plan:
                await asyncio.sleep(max(0.0, self._begun_s + fault.at_s - time.monotonic()))
                faults.create_task(self._carry_out(fault))

    async def _carry_out(self, fault: Fault) -> None:
        if fault.is_disruptive:
            async with self._locks[fault.pool]:
                done = await self._disrupt(fault)
        elif fault.kind is Kind.TRANSFER_DELAY:
            done = await self._delay(fault)
        else:
            done = await self._leave(fault)
        self.done.append(done)
        self._tell(done)

    def _tell(self, done: Done) -> None:
        back = "" if done.recovery_s is None else f", back after {done.recovery_s:.1f} s"
        seconds = f" {done.fault.seconds:.1f} s" if done.fault.seconds else ""
        error = f": {done.error}" if done.error else ""
        print(f"{done.at_s - self._begun_s:7.1f} s  {done.fault.kind}{seconds}, {done.victim}{back}{error}", flush=True)

    async def _disrupt(self, fault: Fault) -> Done:
        assert fault.pool is not None, "only clients have no pool"
        victim, standstill = f"{fault.pool}", None
        at_s = time.monotonic()
        if fault.kind in (Kind.SCALE_UP, Kind.SCALE_DOWN):
            change = 1 if fault.kind is Kind.SCALE_UP else -1
            self._cluster.scale(fault.pool, self._cluster.wanted[fault.pool] + change)
        else:
            process = await self._victim(fault)
            at_s = time.monotonic()
            if process is None:
                return Done(fault, at_s, victim, error=_NO_VICTIM)
            victim += f" {process.pid}"
            if fault.kind in _KILLS:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            else:
                standstill = _stop(process, fault.seconds)
        recovery_s = await self._await_whole(fault.pool, at_s)
        if standstill is not None:
            await standstill
        error = None if recovery_s is not None else f"not back within {RECOVERY_TIMEOUT_S:g} s"
        return Done(fault, at_s, victim, recovery_s, error)

    async def _victim(self, fault: Fault) -> psutil.Process | None:
        assert fault.pool is not None, "clients are no processes"
        replicas = await asyncio.to_thread(self._cluster.healthy, fault.pool)
        if not replicas:
            return None
        replica = replicas[int(fault.pick * len(replicas))]
        hits_engine = fault.pool in ENGINE_POOLS and fault.kind is not Kind.REPLICA_KILL
        return replica.engine if hits_engine else replica.front

    async def _await_whole(self, pool: Pool, since_s: float) -> float | None:
        """Seconds from `since_s` until the pool was whole and stayed so."""
        whole_since_s: float | None = None
        while (now_s := time.monotonic()) < since_s + RECOVERY_TIMEOUT_S:
            if not await asyncio.to_thread(self._cluster.is_whole, pool):
                whole_since_s = None
            elif whole_since_s is None:
                whole_since_s = now_s
            elif now_s - whole_since_s >= _STEADY_S:
                return whole_since_s - since_s
            await asyncio.sleep(_POLL_S)
        return None

    async def _delay(self, fault: Fault) -> Done:
        """Stop an engine for a moment while a prompt is computed or handed over."""
        await self._client.next_stream(_PROMPT_TIMEOUT_S)
        await asyncio.sleep(_UNDER_WAY_S)
        process = await self._victim(fault)
        at_s = time.monotonic()
        if process is None:
            return Done(fault, at_s, f"{fault.pool}", error=_NO_VICTIM)
        await _stop(process, fault.seconds)
        return Done(fault, at_s, f"{fault.pool} {process.pid}")

    async def _leave(self, fault: Fault) -> Done:
        at_s, call = time.monotonic(), self._deck.draw()
        record = await self._client.send(Call(call.probe, call.stream, fault.seconds))
        return Done(fault, at_s, f"a client, with {len(record.token_ids)} tokens")


def _stop(process: psutil.Process, seconds: float) -> "asyncio.Task[None]":
    """Stop a process at once, and let it go on after a while; it may be killed meanwhile."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()

    async def go_on() -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    return asyncio.create_task(go_on())
