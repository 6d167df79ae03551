"""A service of which both pools have no replica: it is woken by requests, which it holds, and sleeps again.

It takes its time before it may be woken and before it sleeps again. Tests of other services take place meanwhile, since
`conftest.py` has the tests of this module apart.
"""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from ray import serve

from app.config import AppConfig
from app.graph import graph
from tests.e2e.conftest import ENGINE_PATIENCE, MODEL_NAME, Service, save_small_model
from tests.engine.families import random_prompt, reference
from tests.waiting import wait_until

NAME = "sleeper"
NUM_TOKENS = 12
HOLD_S = 5.5  # the shortest
# A start or a stop, on a machine that others keep busy.
TIMEOUT_S = 300.0
PROMPTS = [random_prompt(length, seed=length) for length in (5, 40, 150)]


@pytest.fixture(scope="package")
def sleeper(services: dict[str, Service], tmp_path_factory: pytest.TempPathFactory) -> Service:
    small = {"min_replicas": 0, "num_cpus": 0.1}  # of those that services of all tests have left
    args = AppConfig.model_validate(
        {
            "model": save_small_model(tmp_path_factory.mktemp(NAME) / "model"),
            "served_model_name": MODEL_NAME,
            "parity_check": False,
            "engine": ENGINE_PATIENCE | {"num_blocks": 200, "block_size": 16},
            "ingress": {"max_ttft_s": 600, "max_start_s": TIMEOUT_S},
            "prefill": small,
            "decode": small | {"graceful_shutdown_timeout_s": 1.0},
            "planner": {"enabled": True, "hold_s": HOLD_S, "start_s": 0.1},
        }
    )
    serve.run(graph(args), name=NAME, route_prefix=f"/{NAME}")
    return Service("disaggregated", services["colocated"].url.removesuffix("colocated") + NAME, NAME)


def states(service: Service, pool: str) -> dict[str, int]:
    """How many of its replicas are in which state, by Ray Serve."""
    deployment = serve.status().applications[service.name or ""].deployments[pool]
    return {str(state): count for state, count in deployment.replica_states.items() if count}


def wait_until_asleep(service: Service) -> None:
    wait_until(lambda: not states(service, "Decode") and not states(service, "Prefill"), TIMEOUT_S)
    wait_until(lambda: read(service, "live")["health"]["reason"].startswith("no decode replica runs"), TIMEOUT_S)


def read(service: Service, path: str) -> Any:
    answer = httpx.get(f"{service.url}/{path}", timeout=TIMEOUT_S)
    assert answer.status_code == httpx.codes.OK, answer.text
    return answer.json()


async def ask(client: httpx.AsyncClient, service: Service, prompt: tuple[int, ...], *, stream: bool) -> tuple[int, ...]:
    """The tokens of an answer."""
    fields = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    body = fields | {"return_token_ids": True, "stream": stream}
    token_ids: list[int] = []
    async with client.stream("POST", f"{service.url}/v1/completions", json=body) as answer:
        lines = [line async for line in answer.aiter_lines() if line and line != "data: [DONE]"]
        assert answer.status_code == httpx.codes.OK, lines
    for line in lines:
        token_ids += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
    return tuple(token_ids)


async def wake(service: Service) -> list[tuple[int, ...]]:
    """What three callers get, while a fourth one leaves."""

    def holds(count: int) -> bool:
        return service.metric("kvrelay_requests_held") == count

    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        calls = [asyncio.create_task(ask(client, service, p, stream=p is not PROMPTS[1])) for p in PROMPTS]
        leaver = asyncio.create_task(ask(client, service, PROMPTS[0], stream=True))
        # Before a replica can have started.
        await asyncio.to_thread(wait_until, lambda: holds(4), TIMEOUT_S)
        leaver.cancel()
        await asyncio.to_thread(wait_until, lambda: holds(3), TIMEOUT_S)
        assert not any(call.done() for call in calls)
        return await asyncio.gather(*calls)


@pytest.fixture(scope="package")
def slept_s(sleeper: Service) -> float:
    """When it was seen to be asleep for the first time."""
    wait_until_asleep(sleeper)
    return time.monotonic()


@pytest.fixture(scope="package")
def answers(sleeper: Service, slept_s: float) -> list[tuple[int, ...]]:
    """Of those who have woken it."""
    # Else what comes counts as a sign that it slept too soon, and it stays awake for longer.
    wait_until(lambda: time.monotonic() - slept_s > 2 * HOLD_S)
    assert not states(sleeper, "Decode"), "to be asked for health and numbers does not wake it"
    return asyncio.run(wake(sleeper))


def test_a_service_that_nobody_calls_sleeps_and_says_what_it_serves(sleeper: Service, slept_s: float) -> None:
    assert read(sleeper, "health") == {"status": "ok"}
    assert [model["id"] for model in read(sleeper, "v1/models")["data"]] == [MODEL_NAME]
    assert sleeper.metric("kvrelay_requests_held") == 0


def test_requests_wake_it_and_get_their_tokens(sleeper: Service, answers: list[tuple[int, ...]]) -> None:
    assert answers == [reference("llama", prompt, NUM_TOKENS) for prompt in PROMPTS]
    (decode,) = sleeper.stats("Decode")
    assert decode.engine.finished == 3, "no engine has heard of the one that left"
    assert read(sleeper, "live")["health"] == {"status": "ok", "reason": ""}


def test_a_service_that_was_woken_sleeps_again(sleeper: Service, answers: list[tuple[int, ...]]) -> None:
    assert answers
    wait_until_asleep(sleeper)
