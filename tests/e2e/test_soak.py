"""Hundreds of requests, clients that leave among them, leave nothing behind: the short form of `make bench-soak`."""

import asyncio
from collections.abc import Sequence

import psutil

from tests.bench.chaos.cluster import live_actors
from tests.bench.chaos.load import Client, Ending
from tests.bench.chaos.probes import Deck, Probe, build_probes
from tests.bench.soak.processes import Usage, take
from tests.bench.soak.verdict import Idle, by_process, find_leaks
from tests.e2e.conftest import MODEL_NAME, Service
from tests.e2e.waiting import wait_idle
from tests.waiting import wait_until

# Half of the measured requests are new and handed over, the other half was asked before and is found in caches. Prompts
# are hardly longer than what is handed over: to compute them takes most of the time.
NUM_OLD, NUM_NEW = 50, 100
PROMPT_TOKENS, MAX_TOKENS = (64, 70), (3, 8)
NUM_CLIENTS = 8
LEAVE_SHARE, LEAVE_WITHIN_S = 0.15, 0.5
# Per request, in bytes, by role. Allocators, buffers of Ray's and the memory that chunks are handed over in still fill:
# an engine grew by 67,256, an ingress by 17,797, a front by 11,940 (one run, 2026-11-27). One KV block is 737,280.
MAX_GROWTH = {"engine": 256 * 1024, "prefill front": 64 * 1024, "decode front": 64 * 1024, "ingress": 64 * 1024}
CLOSING_TIMEOUT_S = 60.0


def drive(service: Service, probes: Sequence[Probe], seed: int) -> int:
    """Ask for every probe once; how many requests that were."""

    async def ask() -> None:
        deck = Deck(probes, seed, LEAVE_SHARE, LEAVE_WITHIN_S)
        async with Client(service.url, MODEL_NAME) as client:
            records = await client.send_all([deck.draw() for _ in probes], NUM_CLIENTS)
        endings = {record.ending for record in records}
        assert endings == {Ending.WHOLE, Ending.LEFT}, [record.error for record in records if record.error]

    asyncio.run(ask())
    wait_idle(service, 120)
    return len(probes)


def count() -> Idle:
    """What there is; of a service that holds nothing for requests."""
    return Idle(tuple(take(psutil.Process().children(recursive=True), 0.0)), len(live_actors()), {})


def watched(idle: Idle) -> dict[str, Usage]:
    return {name: usage for name, (usage,) in by_process(idle.usage).items() if usage.role in MAX_GROWTH}


def test_hundreds_of_requests_leave_nothing_behind(disaggregated: Service) -> None:
    probes = build_probes(1, NUM_OLD + NUM_NEW, PROMPT_TOKENS, MAX_TOKENS)
    old, new = probes[:NUM_OLD], probes[NUM_OLD:]
    drive(disaggregated, old, seed=1)  # the first ones make threads, connections and buffers that stay
    before = count()
    num_requests = drive(disaggregated, new, seed=2) + drive(disaggregated, old * (NUM_NEW // NUM_OLD), seed=3)

    def count_without_leaks() -> Idle | None:
        after = count()
        return None if list(find_leaks(before, after)) else after

    # Connections of clients who left close by and by.
    after = wait_until(count_without_leaks, CLOSING_TIMEOUT_S, lambda: list(find_leaks(before, count())))
    was, is_now = watched(before), watched(after)
    assert {usage.role for usage in was.values()} == set(MAX_GROWTH)
    for name, usage in is_now.items():
        grown_bytes = (usage.rss_bytes - was[name].rss_bytes) / num_requests
        print(f"{name}: {grown_bytes:.0f} bytes per request")
        assert grown_bytes <= MAX_GROWTH[usage.role], name
