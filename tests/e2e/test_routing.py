"""Two replicas of each pool: a conversation goes on where its KV is, a hot prefix is spread, a death costs a retry."""

import os
import random
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import MODEL_NAME, Scaled, Service
from tests.e2e.waiting import wait_for_a_reading
from tests.waiting import wait_until

BLOCK_SIZE = 16
FIRST_TURN = 400  # tokens
NUM_CONVERSATIONS = 6


@pytest.fixture
def routed(scaled: Scaled) -> Service:
    scaled.wait_for_two()
    return scaled.service


def prompt(num_tokens: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(num_tokens)]


def ask(service: Service, client: httpx.Client, tokens: list[int] | list[list[int]]) -> dict[str, Any]:
    body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    asked = client.post(f"{service.url}/v1/completions", json=body, headers={"x-kvrelay-receipt": "1"})
    answer: dict[str, Any] = asked.raise_for_status().json()
    return answer


def why(answer: dict[str, Any]) -> str:
    """Its decode replica was chosen, as the router says."""
    (attempt,) = answer["receipt"]["choices"][0]["attempts"]
    reason: str = attempt["decode"]["reason"]
    return reason


def num_handed_over(service: Service) -> int:
    return sum(row.handoff.num_requests for row in service.stats("Prefill"))


def test_next_turns_go_where_the_kv_is_until_that_replica_dies(routed: Service, client: httpx.Client) -> None:
    before = num_handed_over(routed)  # by other tests
    firsts = [prompt(FIRST_TURN, seed) for seed in range(NUM_CONVERSATIONS)]
    seconds = [first + prompt(40, seed + 100) for seed, first in enumerate(firsts)]
    for first in firsts:
        assert ask(routed, client, first)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    # An answer may overtake what tells prefill's front that the last chunk has arrived.
    expected = before + NUM_CONVERSATIONS
    wait_until(lambda: num_handed_over(routed) == expected, describe=lambda: num_handed_over(routed) - before)
    wait_for_a_reading(routed)
    answers = [ask(routed, client, second) for second in seconds]
    num_cached = FIRST_TURN // BLOCK_SIZE * BLOCK_SIZE
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [num_cached] * NUM_CONVERSATIONS
    assert [why(answer).partition(":")[0] for answer in answers] == ["cache"] * NUM_CONVERSATIONS, [*map(why, answers)]
    assert num_handed_over(routed) == expected, "decode had all but their last 40 tokens"
    wait_for_a_reading(routed)
    victim = routed.pool("Decode").broadcast("engine_info").results(timeout_s=30)[0].pid
    os.kill(victim, signal.SIGKILL)
    again = [ask(routed, client, second) for second in seconds]
    assert [a["choices"][0]["text"] for a in again] == [a["choices"][0]["text"] for a in answers]


def test_a_hot_prefix_is_spread_over_both_pools(routed: Service, client: httpx.Client) -> None:
    prefix = prompt(FIRST_TURN, seed=50)
    before = {row.replica: row.engine.prompt_tokens for row in routed.stats("Prefill")}
    with ThreadPoolExecutor(16) as threads:
        many = [prefix + prompt(100, seed) for seed in range(1000, 1048)]
        for answer in threads.map(lambda tokens: ask(routed, client, tokens), many):
            assert answer["usage"]["completion_tokens"] == 8
    computed = [row.engine.prompt_tokens - before[row.replica] for row in routed.stats("Prefill")]
    assert min(computed) > sum(computed) / 4


def test_prompts_of_one_call_that_wait_for_replicas_at_once_all_come(routed: Service, client: httpx.Client) -> None:
    answer = ask(routed, client, [prompt(150, seed) for seed in range(70, 74)])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    text = routed.metrics()
    assert re.search(r'^kvrelay_routing_choices_total{ingress="[^"]+",pool="decode",reason="', text, re.MULTILINE)
    assert re.search(r'^kvrelay_routing_promised_tokens_total{ingress="[^"]+",pool="prefill"}', text, re.MULTILINE)
