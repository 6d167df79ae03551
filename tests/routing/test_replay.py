"""The replay of `make bench-router` on a trace small enough to count by hand, and the router's place among others."""

import random

import pytest

from deployments.routing.settings import RoutingSettings
from tests.bench.router.decisions import time_decisions
from tests.bench.router.engines import Speed
from tests.bench.router.policies import BoundedHash, Policy, RandomChoice, RoundRobin, Routers, TwoChoices
from tests.bench.router.replay import replay
from tests.bench.router.trace import BLOCK_SIZE, Arrival, hot_prefix, reusable_tokens

SPEED = Speed(step_s=0.0, token_s=0.001)


def arrival(at_s: float, *blocks: int) -> Arrival:
    """A prompt of whole blocks and one token."""
    return Arrival(at_s, len(blocks) * BLOCK_SIZE + 1, tuple(block.to_bytes(16, "big") for block in blocks))


def sessions(num_sessions: int, num_turns: int, seed: int) -> list[Arrival]:
    """Turns of sessions that begin alike, in random order, each turn a block longer."""
    draw = random.Random(seed)
    turns = [session for session in range(num_sessions) for _ in range(num_turns)]
    draw.shuffle(turns)
    arrivals, lengths = [], dict.fromkeys(range(num_sessions), 3)
    for number, session in enumerate(turns):
        own = (1000 * (session + 1) + i for i in range(lengths[session]))
        arrivals.append(arrival(number * 0.4, 0, *own))
        lengths[session] += 1
    return arrivals


def test_one_cache_finds_what_came_before_and_no_last_token() -> None:
    arrivals = [arrival(0, 1, 2), arrival(1, 1, 2, 3), Arrival(2, BLOCK_SIZE, arrival(0, 1).chain)]
    assert reusable_tokens(arrivals) == 2 * BLOCK_SIZE
    assert reusable_tokens(arrivals, max_blocks=1) == BLOCK_SIZE, "the end of a prefix goes first"


def test_a_replay_computes_what_is_not_cached_and_waits_in_line() -> None:
    result = replay([arrival(0, 1, 2), arrival(0, 1, 2)], RoundRobin(), 1, 100, SPEED)
    assert (result.found_tokens, result.computed_tokens) == (2 * BLOCK_SIZE, (2 * BLOCK_SIZE + 2,))
    assert result.ttft_s == pytest.approx((1.025, 1.026))


def test_the_router_keeps_more_reuse_than_the_others_with_its_load_even() -> None:
    arrivals = sessions(60, 12, seed=1)
    reusable = reusable_tokens(arrivals)
    others: list[Policy] = [RandomChoice(0), RoundRobin(), TwoChoices(0), BoundedHash(6, 2)]
    found = [replay(arrivals, policy, 6, 400, SPEED).found_tokens / reusable for policy in others]
    for num_routers in (1, 3):
        ours = replay(arrivals, Routers(RoutingSettings(), num_routers, 0.05), 6, 400, SPEED)
        assert ours.found_tokens / reusable > max(0.9, *found)
        assert ours.imbalance < 1.3


def test_a_hot_prefix_is_spread_by_routers_that_do_not_talk() -> None:
    arrivals = hot_prefix(8 * BLOCK_SIZE, BLOCK_SIZE, 600, gap_s=0.15)
    result = replay(arrivals, Routers(RoutingSettings(), 3, 0.05), 8, 400, SPEED)
    assert result.imbalance < 1.5
    assert result.found_tokens > 0.9 * reusable_tokens(arrivals)


def test_timed_requests_find_their_prefixes_in_both_pools() -> None:
    timings = time_decisions(4, 800, BLOCK_SIZE, num_decisions=120, num_new_tokens=20, seed=1)
    assert timings.num_blocks == 800
    assert len(timings.routing_s) == len(timings.request_s) == 120
