"""Engines that die or hang at every stage of a request: the client sees only time, and the living hold nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import pytest
import pytest_asyncio
from torch import Tensor

from deployments.engine.engine import Engine
from deployments.errors import EngineDeadError
from deployments.messages import ChunkReady, FinishReason, GenerateRequest, SamplingParams, TokenOutput
from tests.deployments.fakes import LocalActor, Pools
from tests.deployments.test_fronts import NUM_TOKENS, PROMPT, collect, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import reference

LEASE_S = 0.5
# So many that a test can look while they are generated.
MANY_TOKENS = 200
SAMPLED = SamplingParams(max_tokens=MANY_TOKENS, temperature=1.0, top_p=0.9, seed=11)

StartPools = Callable[..., Awaitable[Pools]]


@pytest_asyncio.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartPools]:
    """Starts pools with steps of 32 tokens, so that the prompt takes five."""
    started: list[Pools] = []

    async def start(**options: object) -> Pools:
        pools = await Pools.start(monkeypatch, max_num_batched_tokens=32, **options)  # type: ignore[arg-type]
        started.append(pools)
        return pools

    yield start
    for pools in started:
        for actor in pools.actors:
            actor.goes_on.set()
            actor.lets_go.set()
        await pools.stop()


async def until(actor: LocalActor, condition: Callable[[Engine], bool]) -> None:
    """Return when the engine is where the test wants it; the test's own timeout bounds it."""
    while not await actor._command(condition):  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def is_reserved(engine: Engine) -> bool:
    return len(engine._inbox) == 1


def is_filling(engine: Engine) -> bool:
    return engine.stats().num_exported_blocks > 0 or engine.stats().prompt_tokens > 32


def is_decoding(engine: Engine) -> bool:
    return engine.stats().num_running == 1 and engine.stats().generated_tokens >= 3


WHERE_DECODE_IS = [is_reserved, is_decoding]


@pytest.mark.parametrize("where", WHERE_DECODE_IS)
@pytest.mark.parametrize("sampling", [SamplingParams(MANY_TOKENS, temperature=0), SAMPLED], ids=["greedy", "sampled"])
async def test_another_decode_engine_goes_on_token_for_token(
    start: StartPools, where: Callable[[Engine], bool], sampling: SamplingParams
) -> None:
    pools = await start(num_decode=2, enable_prefix_caching=False)
    undisturbed = tokens_of(await collect(pools, GenerateRequest("before", PROMPT, sampling)))
    pools.decode_actor.holds = lambda chunk: where is is_reserved
    reading = asyncio.create_task(collect(pools, GenerateRequest("r", PROMPT, sampling)))
    await until(pools.decode_actor, where)
    pools.decode_actor.die()
    pools.decode_actor.lets_go.set()
    assert tokens_of(await reading) == undisturbed
    assert pools.tokens.num_streams == 0
    await pools.wait_idle()


@pytest.mark.parametrize("num_deaths", [1, 2, 3])
async def test_a_request_outlives_several_deaths(start: StartPools, num_deaths: int) -> None:
    pools = await start(num_decode=num_deaths + 1)
    outputs: list[TokenOutput] = []
    async with aclosing(pools.generate(greedy("r", PROMPT, NUM_TOKENS))) as stream:
        for actor in pools.actors[1 : 1 + num_deaths]:
            outputs.append(await anext(stream))
            actor.die()
        outputs += [output async for output in stream]
    assert tokens_of(outputs) == reference("llama", PROMPT, NUM_TOKENS)
    resumed = pools.backend.clients.registry.get_sample_value("kvrelay_requests_resumed_total")
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
        for actor in pools.actors[1 : 1 + num_deaths]:
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
        pools.decode_actor.die()
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
    with pytest.raises(EngineDeadError):
        await pools.decode.check_health()
    await pools.wait_idle()


async def test_a_request_that_no_replica_goes_on_with_fails_in_bounded_time(start: StartPools) -> None:
    pools = await start(num_decode=2, resume_timeout_s=0.3)
    async with aclosing(pools.generate(greedy("r", PROMPT, 500))) as stream:
        await anext(stream)
        pools.actors[2].hang()
        pools.actors[1].die()
        with pytest.raises(EngineDeadError, match="no replica went on with the request"):
            async for _ in stream:
                pass
    pools.actors[2].goes_on.set()
    await pools.wait_idle()


@pytest.mark.parametrize("where", [is_reserved, is_filling])
async def test_another_prefill_engine_computes_the_prompt(start: StartPools, where: Callable[[Engine], bool]) -> None:
    pools = await start(num_prefill=2)
    pools.decode_actor.holds = lambda chunk: True
    reading = asyncio.create_task(collect(pools, greedy("r", PROMPT, NUM_TOKENS)))
    await until(pools.decode_actor if where is is_reserved else pools.prefill_actor, where)
    pools.prefill_actor.die()
    pools.decode_actor.lets_go.set()
    assert tokens_of(await reading) == reference("llama", PROMPT, NUM_TOKENS)
    assert pools.prefills[1]._front.handoff.num_requests == 1
    assert (await pools.decode._front.engine.stats()).prompt_tokens == 0, "the decode engine had nothing to compute"
    await pools.wait_idle()


async def test_a_transfer_that_breaks_again_and_again_ends_with_a_local_prefill(start: StartPools) -> None:
    pools = await start()
    pools.decode_actor.fail_receives = 100
    assert tokens_of(await collect(pools, greedy("r", PROMPT, NUM_TOKENS))) == reference("llama", PROMPT, NUM_TOKENS)
    assert pools.decode._front.handoff.num_failures == 3
    await pools.wait_idle()


async def test_a_prefill_engine_that_hangs_costs_the_lease_and_holds_nothing_when_it_goes_on(start: StartPools) -> None:
    pools = await start(lease_s=LEASE_S)
    pools.decode_actor.holds = lambda chunk: True
    reading = asyncio.create_task(collect(pools, greedy("r", PROMPT, NUM_TOKENS)))
    await until(pools.decode_actor, is_reserved)
    pools.prefill_actor.hang()
    pools.decode_actor.lets_go.set()
    assert tokens_of(await reading) == reference("llama", PROMPT, NUM_TOKENS)
    assert (await pools.decode._front.engine.stats()).expired_leases == 1
    pools.prefill_actor.goes_on.set()
    await pools.wait_idle()


async def test_a_prefill_pool_that_does_not_answer_costs_one_lease_and_is_used_again_when_it_does(
    start: StartPools,
) -> None:
    pools = await start(lease_s=LEASE_S, enable_prefix_caching=False)
    pools.prefill_actor.hang()
    expected = reference("llama", PROMPT, NUM_TOKENS)
    assert tokens_of(await collect(pools, greedy("pays", PROMPT, NUM_TOKENS))) == expected
    assert tokens_of(await collect(pools, greedy("pays not", PROMPT, NUM_TOKENS))) == expected
    assert (await pools.decode._front.engine.stats()).expired_leases == 1
    pools.prefill_actor.goes_on.set()
    while pools.decode._prefill is not None and pools.decode._prefill.threshold is None:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert tokens_of(await collect(pools, greedy("again", PROMPT, NUM_TOKENS))) == expected
    assert pools.prefill._front.handoff.num_requests == 1
    await pools.wait_idle()


async def test_a_decode_engine_that_hangs_amid_the_last_chunk_does_not_keep_the_blocks_of_prefill(
    start: StartPools,
) -> None:
    pools = await start(lease_s=LEASE_S)
    real = pools.decode_actor._receive_kv

    async def receive(chunk: ChunkReady, tensor: Tensor) -> None:
        if chunk.first_token is not None:
            pools.decode_actor.hang()
            await pools.decode_actor.goes_on.wait()
        await real(chunk, tensor)

    pools.decode_actor._receive_kv = receive  # type: ignore[method-assign]
    receive.__name__ = "_receive_kv"
    reading = asyncio.create_task(collect(pools, greedy("r", PROMPT, NUM_TOKENS)))
    await until(pools.prefill_actor, lambda engine: engine.stats().expired_leases == 1)
    await pools.prefill_actor._command(_holds_nothing)
    while pools.prefill._front.handoff.num_failures == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    reading.cancel()
    pools.decode_actor.goes_on.set()
    await pools.wait_idle()


def _holds_nothing(engine: Engine) -> None:
    assert engine.num_sequences == 0 and engine.stats().num_exported_blocks == 0


async def test_a_decode_engine_that_hangs_does_not_keep_the_blocks_of_prefill(start: StartPools) -> None:
    pools = await start(lease_s=LEASE_S)
    pools.decode_actor.holds = lambda chunk: True
    reading = asyncio.create_task(collect(pools, greedy("r", PROMPT, NUM_TOKENS)))
    await until(pools.prefill_actor, is_filling)
    pools.decode_actor.hang()
    await until(pools.prefill_actor, lambda engine: engine.num_sequences == 0 and len(engine._outbox) == 0)
    reading.cancel()
    pools.decode_actor.goes_on.set()
    pools.decode_actor.lets_go.set()
    await pools.wait_idle()


async def test_an_engine_that_hangs_is_given_up_and_its_requests_go_on_elsewhere(
    start: StartPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = await start(num_decode=2)
    monkeypatch.setattr(pools.decode._front, "_max_silence_s", 0.3)
    async with aclosing(pools.generate(greedy("r", PROMPT, NUM_TOKENS))) as stream:
        outputs = [await anext(stream)]
        pools.decode_actor.hang()
        with pytest.raises(EngineDeadError, match="has not answered"):
            await pools.decode.check_health()
        outputs += [output async for output in stream]
    assert tokens_of(outputs) == reference("llama", PROMPT, NUM_TOKENS)


async def test_an_idle_engine_whose_model_fails_is_found_by_the_canary(
    start: StartPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = await start()
    await pools.decode.check_health()

    def fail(*_: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(pools.decode_actor.engine._runner, "launch", fail)
    with pytest.raises(EngineDeadError, match="device-side assert"):
        await pools.decode.check_health()
    await pools.prefill.check_health()
    await pools.wait_idle()
