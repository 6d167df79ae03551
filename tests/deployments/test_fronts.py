"""Requests through both fronts: the same tokens whatever happens on the way, and nothing held afterwards."""

import asyncio
from contextlib import aclosing

import pytest
import pytest_asyncio

from deployments.errors import EngineDeadError, RequestTooLargeError
from deployments.messages import FinishReason, GenerateRequest, SamplingParams
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, PROMPT, Pools, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import random_prompt, reference
from tests.waiting import until


@pytest_asyncio.fixture
async def pools(start: StartPools) -> Pools:
    return await start()


async def test_a_long_prompt_is_handed_over_and_a_short_one_is_not(pools: Pools) -> None:
    assert tokens_of(await pools.collect(greedy("long", PROMPT, NUM_TOKENS))) == reference("llama", PROMPT, NUM_TOKENS)
    # Decode may have answered before prefill's front has heard that the last chunk is there.
    await until(lambda: pools.prefill.front.handoff.num_requests == 1)
    assert (await pools.prefill.engine.stats()).prompt_tokens == len(PROMPT)
    assert pools.prefill.front.handoff.num_chunks >= 5, "a chunk leaves with every step of the prompt"
    short = PROMPT[:10]
    assert tokens_of(await pools.collect(greedy("short", short, NUM_TOKENS))) == reference("llama", short, NUM_TOKENS)
    await pools.wait_idle()
    assert pools.prefill.front.handoff.num_requests == 1
    assert (await pools.prefill.engine.stats()).prompt_tokens == len(PROMPT)


async def test_many_at_once_get_their_own_tokens(pools: Pools) -> None:
    prompts = [random_prompt(length, seed=length) for length in (5, 17, 33, 40, 64, 65, 100, 150)]
    requests = [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(pools.collect(request) for request in requests))
    assert [tokens_of(answer) for answer in answers] == [reference("llama", p, NUM_TOKENS) for p in prompts]
    await pools.wait_idle()


async def test_a_broken_transfer_costs_only_time(pools: Pools) -> None:
    pools.decode.engine.fail_receives = 1
    answer = await pools.collect(greedy("r", PROMPT, NUM_TOKENS))
    assert tokens_of(answer) == reference("llama", PROMPT, NUM_TOKENS)
    assert pools.decode.front.handoff.num_failures == 1
    await pools.wait_idle()


async def test_a_dead_prefill_engine_costs_only_time(pools: Pools) -> None:
    pools.prefill.engine.die()
    answer = await pools.collect(greedy("r", PROMPT, NUM_TOKENS))
    assert tokens_of(answer) == reference("llama", PROMPT, NUM_TOKENS)
    with pytest.raises(EngineDeadError):
        await pools.prefill.deployment.check_health()


@pytest.mark.parametrize("num_outputs", [0, 1, 2, 5])
async def test_closing_the_stream_frees_both_pools(pools: Pools, num_outputs: int) -> None:
    async with aclosing(pools.generate(greedy("r", PROMPT, 500))) as stream:
        for _ in range(num_outputs):
            await anext(stream)
    await pools.wait_idle()


@pytest.mark.parametrize(("of_prefill", "of_decode"), [(0, 0), (1, 0), (3, 0), (5, 0), (5, 1), (5, 4)])
async def test_cancelling_the_reader_after_any_step_frees_both_pools(
    pools: Pools, of_prefill: int, of_decode: int
) -> None:
    reader = asyncio.create_task(pools.collect(greedy("r", PROMPT, 800)))
    await pools.prefill.engine.until(lambda engine: engine.stats().steps >= of_prefill)
    await pools.decode.engine.until(lambda engine: engine.stats().steps >= of_decode)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await pools.wait_idle()


async def test_a_stop_token_drawn_by_prefill_ends_the_request_at_once(pools: Pools) -> None:
    first = reference("llama", PROMPT, 1)[0]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, stop_token_ids=(first,))
    (output,) = await pools.collect(GenerateRequest("r", PROMPT, sampling))
    assert output.token_ids == (first,)
    assert output.finish_reason is FinishReason.STOP
    await pools.wait_idle()


async def test_a_request_that_can_never_fit_is_refused_with_the_numbers(pools: Pools) -> None:
    with pytest.raises(RequestTooLargeError, match=r"150 prompt tokens \+ 5000 to generate"):
        await pools.collect(greedy("r", PROMPT, 5000))
    await pools.wait_idle()


async def test_numbers_of_an_engine_that_does_not_answer_are_those_of_before_and_say_how_old_they_are(
    start: StartPools,
) -> None:
    pools = await start(stats_timeout_s=0.05)
    while (known := await pools.prefill.deployment.stats()).age_s > 0:
        pass  # the machine is busy
    assert known.engine.num_blocks == 128
    pools.prefill.engine.hang()
    old = await pools.prefill.deployment.stats()
    older = await pools.prefill.deployment.stats()
    assert 0 < old.age_s < older.age_s
    assert older.engine == known.engine
