"""Engines that die or hang at every stage of a request: the client sees only time, and the living hold nothing."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from deployments.engine.engine import Engine
from deployments.errors import EngineDeadError
from deployments.messages import ChunkReady, FinishReason, GenerateRequest, SamplingParams
from tests.deployments.conftest import StartPools
from tests.deployments.faulty_engine import HeldClock
from tests.deployments.pools import MANY_TOKENS, NUM_TOKENS, PROMPT, is_decoding, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import reference
from tests.waiting import until

LEASE_S = 0.5
SAMPLED = SamplingParams(max_tokens=MANY_TOKENS, temperature=1.0, top_p=0.9, seed=11)


def is_reserved(engine: Engine) -> bool:
    return engine.stats().num_reserved == 1


def is_filling(engine: Engine) -> bool:
    return engine.stats().num_exported_blocks > 0 or engine.stats().prompt_tokens > 32


def is_last(chunk: ChunkReady) -> bool:
    return chunk.is_last


WHERE_DECODE_IS = [is_reserved, is_decoding]


@pytest.mark.parametrize("where", WHERE_DECODE_IS)
@pytest.mark.parametrize("sampling", [SamplingParams(MANY_TOKENS, temperature=0), SAMPLED], ids=["greedy", "sampled"])
async def test_another_decode_engine_goes_on_token_for_token(
    start: StartPools, where: Callable[[Engine], bool], sampling: SamplingParams
) -> None:
    pools = await start(num_decode=2, enable_prefix_caching=False)
    undisturbed = tokens_of(await pools.collect(GenerateRequest("before", PROMPT, sampling)))
    pools.decode.engine.holds = lambda chunk: where is is_reserved
    reading = asyncio.create_task(pools.collect(GenerateRequest("r", PROMPT, sampling)))
    await pools.decode.engine.until(where)
    pools.decode.engine.die()
    pools.decode.engine.lets_go.set()
    assert tokens_of(await reading) == undisturbed
    assert pools.tokens.num_streams == 0
    await pools.wait_idle()


async def test_whoever_goes_on_with_a_request_is_told_which_of_its_tokens_were_generated(start: StartPools) -> None:
    pools = await start(num_decode=2)
    request = replace(greedy("r", PROMPT, MANY_TOKENS), cache_salt="theirs")
    pools.decode.engine.stop_at(is_decoding)
    async with aclosing(pools.generate(request)) as stream:
        outputs = [await anext(stream)]  # else none of its tokens may have come
        await pools.decode.engine.until(is_decoding)
        pools.decode.engine.die()
        outputs += [output async for output in stream]
    tokens = tokens_of(outputs)
    (resumed,) = pools.decodes[1].engine.added
    assert resumed.generated_token_ids == tokens[: len(resumed.generated_token_ids)] != ()
    assert replace(resumed, request_id="r", generated_token_ids=()) == request


@pytest.mark.parametrize("num_deaths", [1, 2, 3])
async def test_a_request_outlives_several_deaths(start: StartPools, num_deaths: int) -> None:
    pools = await start(num_decode=num_deaths + 1)
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, MANY_TOKENS)))
    for decode in pools.decodes[:num_deaths]:
        await decode.engine.until(is_decoding)  # those before it are dead, and it was the next one in their order
        decode.engine.die()
    assert tokens_of(await reading) == reference("llama", PROMPT, MANY_TOKENS)
    resumed = pools.backend.clients.stats.num_resumed
    assert resumed == num_deaths
    await pools.wait_idle()


@pytest.mark.parametrize("num_deaths", [0, 1])
@pytest.mark.parametrize("min_tokens", [16, 10_000], ids=["disaggregated", "colocated"])
@pytest.mark.parametrize("place", [0, 3])
async def test_a_stop_token_ends_a_request_wherever_it_is_drawn(
    start: StartPools, min_tokens: int, num_deaths: int, place: int
) -> None:
    tokens = reference("llama", PROMPT, NUM_TOKENS)
    expected = tokens[: tokens.index(tokens[place]) + 1]
    pools = await start(min_tokens=min_tokens, num_decode=2)
    sampling = SamplingParams(max_tokens=MANY_TOKENS, temperature=0, stop_token_ids=(tokens[place], 0))
    async with aclosing(pools.generate(GenerateRequest("r", PROMPT, sampling))) as stream:
        outputs = [await anext(stream)]
        for actor in pools.engines[1 : 1 + num_deaths]:
            actor.die()
        outputs += [output async for output in stream]
    assert tokens_of(outputs) == expected
    assert outputs[-1].finish_reason is FinishReason.STOP
    await pools.wait_idle()


async def test_a_death_without_another_replica_ends_the_request_with_an_error_and_frees_prefill(
    start: StartPools,
) -> None:
    pools = await start()
    async with aclosing(pools.generate(greedy("r", PROMPT, 500))) as stream:
        await anext(stream)
        pools.decode.engine.die()
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
    with pytest.raises(EngineDeadError):
        await pools.decode.deployment.check_health()
    await pools.wait_idle()


async def test_a_request_that_no_replica_goes_on_with_fails_in_bounded_time(start: StartPools) -> None:
    pools = await start(num_decode=2, resume_timeout_s=0.3)
    async with aclosing(pools.generate(greedy("r", PROMPT, 500))) as stream:
        await anext(stream)
        pools.engines[2].hang()
        pools.engines[1].die()
        with pytest.raises(EngineDeadError, match="no replica went on with the request"):
            async for _ in stream:
                pass
    pools.engines[2].goes_on.set()
    await pools.wait_idle()


@pytest.mark.parametrize("where", [is_reserved, is_filling])
async def test_another_prefill_engine_computes_the_prompt(start: StartPools, where: Callable[[Engine], bool]) -> None:
    pools = await start(num_prefill=2)
    pools.decode.engine.holds = lambda chunk: True
    pools.prefill.engine.holds = is_last  # it dies before it has told of all
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, NUM_TOKENS)))
    await (pools.decode if where is is_reserved else pools.prefill).engine.until(where)
    pools.prefill.engine.die()
    for engine in pools.engines:
        engine.lets_go.set()
    assert tokens_of(await reading) == reference("llama", PROMPT, NUM_TOKENS)
    await until(lambda: pools.prefills[1].front.handoff.num_requests == 1)
    assert (await pools.decode.engine.stats()).prompt_tokens == 0, "the decode engine had nothing to compute"
    await pools.wait_idle()


async def test_a_transfer_that_breaks_again_and_again_ends_with_a_local_prefill(start: StartPools) -> None:
    pools = await start()
    pools.decode.engine.fail_receives = 100
    assert tokens_of(await pools.collect(greedy("r", PROMPT, NUM_TOKENS))) == reference("llama", PROMPT, NUM_TOKENS)
    assert pools.decode.front.handoff.num_failures == 3
    await pools.wait_idle()


async def test_a_prefill_engine_that_hangs_costs_the_lease_and_holds_nothing_when_it_goes_on(start: StartPools) -> None:
    pools = await start(lease_s=LEASE_S, clock=(clock := HeldClock()))
    pools.decode.engine.holds = lambda chunk: True
    pools.prefill.engine.holds = is_last  # it hangs before it has told of all
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, NUM_TOKENS)))
    await pools.decode.engine.until(is_reserved)
    pools.prefill.engine.hang()
    for engine in pools.engines:
        engine.lets_go.set()
    clock.go_on()
    assert tokens_of(await reading) == reference("llama", PROMPT, NUM_TOKENS)
    assert (await pools.decode.engine.stats()).expired_leases == 1
    pools.prefill.engine.goes_on.set()
    await pools.wait_idle()


async def test_a_prefill_pool_that_does_not_answer_costs_one_lease_and_is_used_again_when_it_does(
    start: StartPools,
) -> None:
    pools = await start(lease_s=LEASE_S, clock=(clock := HeldClock()), enable_prefix_caching=False)
    pools.prefill.engine.hang()
    clock.go_on()
    expected = reference("llama", PROMPT, NUM_TOKENS)
    assert tokens_of(await pools.collect(greedy("pays", PROMPT, NUM_TOKENS))) == expected
    assert tokens_of(await pools.collect(greedy("pays not", PROMPT, NUM_TOKENS))) == expected
    assert (await pools.decode.engine.stats()).expired_leases == 1
    pools.prefill.engine.goes_on.set()
    await until(lambda: pools.decode.deployment.has_prefill)
    clock.hold()
    assert tokens_of(await pools.collect(greedy("again", PROMPT, NUM_TOKENS))) == expected
    await until(lambda: pools.prefill.front.handoff.num_requests == 1)
    await pools.wait_idle()


async def test_a_decode_engine_that_hangs_amid_the_last_chunk_does_not_keep_the_blocks_of_prefill(
    start: StartPools,
) -> None:
    pools = await start(lease_s=LEASE_S, clock=(clock := HeldClock()))

    def hangs_at_the_last_one(chunk: ChunkReady) -> bool:
        if chunk.is_last:
            pools.decode.engine.hang()
            clock.go_on()
        return False

    pools.decode.engine.holds = hangs_at_the_last_one
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, NUM_TOKENS)))
    await pools.prefill.engine.until(lambda engine: engine.stats().expired_leases == 1)
    await pools.prefill.engine.run(_holds_nothing)
    await until(lambda: pools.prefill.front.handoff.num_failures > 0)
    reading.cancel()
    pools.decode.engine.goes_on.set()
    await pools.wait_idle()


def _holds_nothing(engine: Engine) -> None:
    assert engine.num_sequences == 0 and engine.stats().num_exported_blocks == 0


async def test_a_decode_engine_that_hangs_does_not_keep_the_blocks_of_prefill(start: StartPools) -> None:
    pools = await start(lease_s=LEASE_S, clock=(clock := HeldClock()))
    pools.decode.engine.holds = lambda chunk: True
    reading = asyncio.create_task(pools.collect(greedy("r", PROMPT, NUM_TOKENS)))
    await pools.prefill.engine.until(is_filling)
    pools.decode.engine.hang()
    clock.go_on()
    await pools.prefill.engine.until(
        lambda engine: engine.num_sequences == 0 and engine.stats().num_exported_blocks == 0
    )
    reading.cancel()
    pools.decode.engine.goes_on.set()
    pools.decode.engine.lets_go.set()
    await pools.wait_idle()


async def test_an_engine_that_hangs_is_given_up_and_its_requests_go_on_elsewhere(start: StartPools) -> None:
    pools = await start(num_decode=2, max_silence_s=0.3)
    async with aclosing(pools.generate(greedy("r", PROMPT, NUM_TOKENS))) as stream:
        outputs = [await anext(stream)]
        pools.decode.engine.hang()
        with pytest.raises(EngineDeadError, match="has not answered"):
            await pools.decode.deployment.check_health()
        outputs += [output async for output in stream]
    assert tokens_of(outputs) == reference("llama", PROMPT, NUM_TOKENS)


async def test_an_idle_engine_whose_model_fails_is_found_by_the_canary(start: StartPools) -> None:
    pools = await start()
    await pools.decode.deployment.check_health()
    pools.decode.engine.break_model(RuntimeError("device-side assert"))
    with pytest.raises(EngineDeadError, match="device-side assert"):
        await pools.decode.deployment.check_health()
    await pools.prefill.deployment.check_health()
    await pools.wait_idle()
