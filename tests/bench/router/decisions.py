"""What a decision costs: one router of one pool, and all that an ingress does for a request; no engine."""

import gc
import random
import time
import tracemalloc
from dataclasses import dataclass, replace

from deployments.engine.scheduling.cache_log import CacheLog
from deployments.engine.stats import EngineStats
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.messages import GenerateRequest, SamplingParams
from deployments.replica_stats import HandoffStats, ReplicaStats
from deployments.routing.crossover import Crossover, Goals
from deployments.routing.hashes import PromptHashes
from deployments.routing.pools import PoolRouters
from deployments.routing.router import Report, Router
from deployments.routing.settings import RoutingSettings

_NUM_SESSIONS_PER_REPLICA = 20
# A reading comes each second.
_REQUESTS_PER_READING = 100
# Prompt tokens that wait at each decode replica: more than anybody would wait for.
_BUSY_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class Timings:
    """Of decisions, in seconds, and of what is known while they are taken.

    Attributes:
        hashing_s: of the blocks of each prompt: CPU time.
        routing_s: from there to a replica: likewise.
        wall_s: of both, on whatever machine this is, with whatever else runs there.
        request_s: of all that is done for a request, as CPU time: hashes of its blocks, a decode and a prefill replica,
            each of a pool of that size, until it has ended.
        bytes_per_block: of what the router knows.
        num_blocks: that it knows.
    """

    hashing_s: tuple[float, ...]
    routing_s: tuple[float, ...]
    wall_s: tuple[float, ...]
    request_s: tuple[float, ...]
    bytes_per_block: float
    num_blocks: int


def time_decisions(
    num_replicas: int, num_blocks: int, block_size: int, num_decisions: int, num_new_tokens: int, seed: int
) -> Timings:
    """Fill the caches of replicas with sessions, each cached by one or two of them, and route a next turn of each.

    Args:
        num_replicas: of the pool.
        num_blocks: cached by all of them together.
        block_size: tokens per block.
        num_decisions: that are timed.
        num_new_tokens: of a turn.
        seed: of all that is drawn.
    """
    draw = random.Random(seed)
    blocks_per_session = num_blocks // (num_replicas * _NUM_SESSIONS_PER_REPLICA)
    tokens_per_session = blocks_per_session * block_size
    names = [f"replica-{i}" for i in range(num_replicas)]
    logs = {name: CacheLog() for name in names}
    sessions = []
    for name in names:
        for _ in range(_NUM_SESSIONS_PER_REPLICA):
            tokens = draw.choices(range(50_000), k=tokens_per_session)
            for block in PromptHashes(tokens).of(block_size):
                logs[name].published(block)
            sessions.append(tokens)
    router = Router.for_prefill(RoutingSettings())
    stats = EngineStats(num_blocks=num_blocks, max_num_seqs=64, max_num_batched_tokens=8192)
    gc.collect()
    tracemalloc.start()
    router.update({name: Report(stats, block_size, logs[name].since(None)) for name in names}, 0.0, 0.0)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    known = sum(len(list(log.held)) for log in logs.values())
    hashing_s, routing_s, wall_s = [], [], []
    now_s = 0.0
    for _ in range(num_decisions):
        tokens = draw.choice(sessions) + draw.choices(range(50_000), k=num_new_tokens)
        now_s += 0.01
        wall_begun_s, begun_s = time.perf_counter(), time.thread_time()
        prompt = PromptHashes(tokens)
        prompt.of(block_size)
        hashed_s = time.thread_time()
        routed = router.route(prompt, now_s)
        routed_s = time.thread_time()
        wall_s.append(time.perf_counter() - wall_begun_s)
        hashing_s.append(hashed_s - begun_s)
        routing_s.append(routed_s - hashed_s)
        routed.computed(now_s)
        routed.ended(now_s)
    request_s = time_requests(
        logs, sessions, replace(stats, block_size=block_size), num_decisions, num_new_tokens, draw
    )
    return Timings(tuple(hashing_s), tuple(routing_s), tuple(wall_s), request_s, taken / known, known)


def time_requests(
    logs: dict[str, CacheLog],
    sessions: list[list[int]],
    stats: EngineStats,
    num_requests: int,
    num_new_tokens: int,
    draw: random.Random,
) -> tuple[float, ...]:
    """CPU seconds of each request at an ingress, with two pools that have cached the same.

    Args:
        logs: of the caches, by replica.
        sessions: the prompts.
        stats: of each engine.
        num_requests: that are timed.
        num_new_tokens: of a turn.
        draw: what turns are made of.
    """
    now_s = 0.0
    # Else decode computes all prompts itself, and a prefill replica is looked at, but never sent anything.
    busy = replace(stats, num_queued_prompt_tokens=_BUSY_TOKENS)
    routers = PoolRouters(RoutingSettings(), Crossover(Goals(ttft_s=2.0, itl_s=0.1)), clock=lambda: now_s)

    def read() -> None:
        replicas = {}
        for pool, now in ((DECODE, busy), (PREFILL, stats)):
            known = routers.positions(pool)
            replicas[pool] = [
                ReplicaStats(name, now, HandoffStats(), 0.0, None if known is None else log.since(known.get(name)))
                for name, log in logs.items()
            ]
        routers.update(Reading.of(replicas, now_s))

    read()  # who is there comes first, then what they have
    taken_s = []
    for number in range(num_requests):
        if number % _REQUESTS_PER_READING == 0:
            read()
        now_s += 1.0 / _REQUESTS_PER_READING
        tokens = draw.choice(sessions) + draw.choices(range(50_000), k=num_new_tokens)
        request = GenerateRequest(str(number), tuple(tokens), SamplingParams(max_tokens=100))
        begun_s = time.thread_time()
        routed = routers.route(request)
        routed.first_token()
        routed.ended()
        taken_s.append(time.thread_time() - begun_s)
    assert min(routers.promised_tokens.values()) > 0, "nothing was found"
    return tuple(taken_s)
