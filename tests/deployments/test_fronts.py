"""Requests through both fronts: the same tokens whatever happens on the way, and nothing held afterwards."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import pytest_asyncio

from deployments import front
from deployments.errors import EngineDeadError, RequestTooLargeError
from deployments.messages import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from tests.deployments.fakes import Pools
from tests.engine.driving import greedy
from tests.engine.families import random_prompt, reference

PROMPT = random_prompt(150, seed=3)
NUM_TOKENS = 12


@pytest_asyncio.fixture
async def pools(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pools]:
    pools = await Pools.start(monkeypatch, max_num_batched_tokens=32)
    yield pools
    await pools.stop()


async def collect(pools: Pools, request: GenerateRequest) -> list[TokenOutput]:
    async with aclosing(pools.generate(request)) as outputs:
        return [output async for output in outputs]


def tokens_of(outputs: list[TokenOutput]) -> tuple[int, ...]:
    starts = [0, *itertools.accumulate(len(output.token_ids) for output in outputs)]
    assert [output.index for output in outputs] == starts[:-1], "each token comes once, in order"
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return tuple(token for output in outputs for token in output.token_ids)


async def test_a_long_prompt_is_handed_over_and_a_short_one_is_not(pools: Pools) -> None:
    assert tokens_of(await collect(pools, greedy("long", PROMPT, NUM_TOKENS))) == reference("llama", PROMPT, NUM_TOKENS)
    handoff = (await pools.prefill._front.engine.stats(), pools.prefill._front.handoff)
    assert handoff[0].prompt_tokens == len(PROMPT)
    assert handoff[1].num_requests == 1
    assert handoff[1].num_chunks >= 5, "a chunk leaves with every step of the prompt"
    short = PROMPT[:10]
    assert tokens_of(await collect(pools, greedy("short", short, NUM_TOKENS))) == reference("llama", short, NUM_TOKENS)
    assert pools.prefill._front.handoff.num_requests == 1
    await pools.wait_idle()


async def test_many_at_once_get_their_own_tokens(pools: Pools) -> None:
    prompts = [random_prompt(length, seed=length) for length in (5, 17, 33, 40, 64, 65, 100, 150)]
    requests = [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(collect(pools, request) for request in requests))
    assert [tokens_of(answer) for answer in answers] == [reference("llama", p, NUM_TOKENS) for p in prompts]
    await pools.wait_idle()


async def test_a_broken_transfer_costs_only_time(pools: Pools) -> None:
    pools.decode_actor.fail_receives = 1
    answer = await collect(pools, greedy("r", PROMPT, NUM_TOKENS))
    assert tokens_of(answer) == reference("llama", PROMPT, NUM_TOKENS)
    assert pools.decode._front.handoff.num_failures == 1
    await pools.wait_idle()


async def test_a_dead_prefill_engine_costs_only_time(pools: Pools) -> None:
    pools.prefill_actor.die()
    answer = await collect(pools, greedy("r", PROMPT, NUM_TOKENS))
    assert tokens_of(answer) == reference("llama", PROMPT, NUM_TOKENS)
    with pytest.raises(EngineDeadError):
        await pools.prefill.check_health()


@pytest.mark.parametrize("num_outputs", [0, 1, 2, 5])
async def test_closing_the_stream_frees_both_pools(pools: Pools, num_outputs: int) -> None:
    async with aclosing(pools.generate(greedy("r", PROMPT, 500))) as stream:
        for _ in range(num_outputs):
            await anext(stream)
    await pools.wait_idle()


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.03, 0.1])
async def test_cancelling_the_reader_frees_both_pools(pools: Pools, after_s: float) -> None:
    reader = asyncio.create_task(collect(pools, greedy("r", PROMPT, 800)))
    await asyncio.sleep(after_s)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await pools.wait_idle()


async def test_a_stop_token_drawn_by_prefill_ends_the_request_at_once(pools: Pools) -> None:
    first = reference("llama", PROMPT, 1)[0]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, stop_token_ids=(first,))
    (output,) = await collect(pools, GenerateRequest("r", PROMPT, sampling))
    assert output.token_ids == (first,)
    assert output.finish_reason is FinishReason.STOP
    await pools.wait_idle()


async def test_a_request_that_can_never_fit_is_refused_with_the_numbers(pools: Pools) -> None:
    with pytest.raises(RequestTooLargeError, match=r"150 prompt tokens \+ 5000 to generate"):
        await collect(pools, greedy("r", PROMPT, 5000))
    await pools.wait_idle()


async def test_numbers_of_an_engine_that_does_not_answer_are_those_of_before_and_say_how_old_they_are(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="p"))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
    monkeypatch.setattr(front, "_STATS_TIMEOUT_S", 0.05)
    while (known := await pools.prefill.stats()).age_s > 0:
        pass  # the machine is busy
    assert known.engine.num_blocks == 128
    pools.prefill_actor.hang()
    old = await pools.prefill.stats()
    older = await pools.prefill.stats()
    assert 0 < old.age_s < older.age_s
    assert older.engine == known.engine
