"""Greedy tokens over HTTP are those that transformers' own model gives on the same float32 weights."""

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.e2e.conftest import Service
from tests.e2e.greedy import Reference, complete
from tests.waiting import wait_until


def test_tokens_equal_transformers_cold_and_warm_sixteen_at_once(
    client: httpx.Client,
    service: Service,
    prompts: dict[str, list[int]],
    reference: Reference,
) -> None:
    for _ in ("cold", "warm"):
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda item: complete(client, service, *item), prompts.items())
            for name, tokens in zip(prompts, answers, strict=True):
                reference.assert_same(name, tokens)
    if service.mode == "disaggregated":
        long_prompts = sum(len(prompt) >= 64 + 16 for prompt in prompts.values())

        def num_handed_over() -> int:
            return sum(stats.handoff.num_requests for stats in service.stats("Prefill"))

        # The cold round must hand over every long prompt. Its answer may overtake what tells prefill's front so.
        wait_until(lambda: num_handed_over() >= long_prompts, describe=num_handed_over)
    hits = sum(stats.engine.prefix_hit_tokens for stats in service.stats("Decode"))
    assert hits > 3000, "the warm round must find its prompts cached"
