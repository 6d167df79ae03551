"""OpenAI's own client against real engines: logprobs, penalties and `n`, however a request is served.

Disaggregated, colocated, and gone on with by another decode engine after the death of the first.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, TypeVar

import openai
import pytest
import torch
from openai.types import Completion
from ray.serve.context import _RequestContext, _serve_request_context
from torch import Tensor

from deployments.api.http import build_app
from deployments.decode_client import DecodeClient
from deployments.engine.engine import Engine
from deployments.messages import Adjustments, ModelInfo
from tests.api.fakes import build_codec, serving
from tests.deployments.conftest import StartPools
from tests.deployments.pools import PROMPT, Pools
from tests.engine.driving import greedy
from tests.engine.families import VOCAB_SIZE, build_model, reference
from tests.engine.processors import continue_adjusted
from tests.waiting import until

T = TypeVar("T")

NUM_TOKENS = 40
TOLERANCE = 1e-3
INFO = ModelInfo("tiny", "", max_model_len=512, vocab_size=VOCAB_SIZE, eos_token_ids=())
WAYS = ("disaggregated", "colocated", "resumed")
every_way = pytest.mark.parametrize("way", WAYS)


@asynccontextmanager
async def client_of(start: StartPools, way: str) -> AsyncIterator[tuple[openai.AsyncOpenAI, Pools]]:
    pools = await start(min_tokens=10_000 if way == "colocated" else 16, num_decode=2)
    async with (
        serving(build_app(pools.backend, build_codec(), INFO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, pools


def has_begun(engine: Engine) -> bool:
    return engine.stats().generated_tokens >= 4


async def answer_of(call: Awaitable[T], pools: Pools, way: str) -> T:
    """With a death under way, if that is the way."""
    answer = asyncio.ensure_future(call)
    if way == "resumed":
        await pools.decode.engine.until(has_begun)
        pools.decode.engine.die()
    told = await answer
    num_resumed = pools.backend.clients.stats.num_resumed
    assert (num_resumed or 0) > 0 if way == "resumed" else not num_resumed
    return told


@cache
def log_softmax(tokens: tuple[int, ...]) -> Tensor:
    model: Any = build_model("llama")
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def check_logprobs(told: Sequence[float | None], prompt: tuple[int, ...], tokens: Sequence[int]) -> None:
    """Those of consecutive tokens behind a prompt."""
    rows = log_softmax((*prompt, *tokens))[len(prompt) - 1 : -1]
    assert told == pytest.approx(rows.gather(1, torch.tensor([tokens]).T).squeeze(1).tolist(), abs=TOLERANCE)


def tokens_of(answer: Completion, index: int = 0) -> list[int]:
    token_ids: list[int] = answer.choices[index].token_ids  # type: ignore[attr-defined]  # an extension
    return token_ids


IDS = {"return_token_ids": True}


@every_way
async def test_logprobs_are_transformers(start: StartPools, way: str) -> None:
    async with client_of(start, way) as (client, pools):
        call = client.completions.create(
            model="tiny", prompt=[*PROMPT], max_tokens=NUM_TOKENS, temperature=0, logprobs=5, extra_body=IDS
        )
        answer = await answer_of(call, pools, way)
    tokens, logprobs = tokens_of(answer), answer.choices[0].logprobs
    assert tuple(tokens) == reference("llama", PROMPT, NUM_TOKENS) and logprobs is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    check_logprobs(logprobs.token_logprobs, PROMPT, tokens)
    best = [max(top.values()) for top in logprobs.top_logprobs]
    assert best == logprobs.token_logprobs, "greedy"


@every_way
async def test_a_streamed_chat_has_them_too(start: StartPools, way: str) -> None:
    async with client_of(start, way) as (client, pools):
        pools.decode.engine.stop_at(has_begun if way == "resumed" else None)
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "The quick brown fox jumps over the lazy dog."}],
            max_completion_tokens=NUM_TOKENS,
            seed=3,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            extra_body=IDS,
        )
        told: list[float] = []
        tokens: list[int] = []
        prompt: list[int] = []
        async for chunk in stream:
            (choice,) = chunk.choices
            prompt += getattr(chunk, "prompt_token_ids", None) or ()
            told += [token.logprob for token in (choice.logprobs and choice.logprobs.content) or ()]
            tokens += getattr(choice, "token_ids", None) or ()
            if way == "resumed" and len(tokens) > 3 and pools.decode.engine.death is None:
                pools.decode.engine.die()
    check_logprobs(told, tuple(prompt), tokens)
    assert len(tokens) == NUM_TOKENS
    num_resumed = pools.backend.clients.stats.num_resumed
    assert bool(num_resumed) is (way == "resumed")


@pytest.mark.parametrize("way", ["disaggregated", "colocated"])
async def test_a_prompt_is_scored_as_lm_eval_asks(start: StartPools, way: str) -> None:
    async with client_of(start, way) as (client, _):
        for max_tokens in (0, 1):
            answer = await client.completions.create(
                model="tiny", prompt=[[*PROMPT], [*PROMPT[:40]]], max_tokens=max_tokens, echo=True, logprobs=1
            )
            for choice, prompt in zip(answer.choices, (PROMPT, PROMPT[:40]), strict=True):
                assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
                told = choice.logprobs.token_logprobs
                assert told[0] is None and len(told) == len(prompt) + max_tokens
                check_logprobs(told[1 : len(prompt)], prompt[:1], prompt[1:])


@every_way
async def test_penalties_are_as_transformers_has_them(start: StartPools, way: str) -> None:
    wanted = Adjustments(((3, 4.0), (7, -6.0)), 1.2, 0.9, -0.3)
    async with client_of(start, way) as (client, pools):
        call = client.completions.create(
            model="tiny",
            prompt=[*PROMPT],
            max_tokens=NUM_TOKENS,
            temperature=0,
            logit_bias={"3": 4, "7": -6},
            presence_penalty=0.9,
            frequency_penalty=-0.3,
            extra_body={"repetition_penalty": 1.2} | IDS,
        )
        answer = await answer_of(call, pools, way)
    assert tuple(tokens_of(answer)) == continue_adjusted(PROMPT, wanted, NUM_TOKENS)


@every_way
async def test_n_samples_are_those_of_n_calls_with_the_seeds_that_follow(start: StartPools, way: str) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": [*PROMPT], "max_tokens": NUM_TOKENS, "extra_body": IDS}
    async with client_of(start, way) as (client, pools):
        alone = [tokens_of(await client.completions.create(seed=5 + sample, **fields)) for sample in range(3)]
        if way == "resumed":
            pools.decodes[1], pools.decodes[0] = pools.decodes
        together = await answer_of(client.completions.create(n=3, seed=5, **fields), pools, way)
        assert [tokens_of(together, sample) for sample in range(3)] == alone
        assert len({tuple(tokens) for tokens in alone}) == 3


@pytest.mark.parametrize("way", ["disaggregated", "colocated"])
async def test_the_prompt_of_n_samples_is_computed_and_handed_over_once(start: StartPools, way: str) -> None:
    async with client_of(start, way) as (client, pools):
        await client.completions.create(model="tiny", prompt=[*PROMPT], max_tokens=NUM_TOKENS, n=4, temperature=1)
        stats = [await engine.run(lambda engine: engine.stats()) for engine in pools.engines]
        block_size = await pools.decode.engine.run(lambda engine: engine.limits.block_size)
    computed = sum(each.prompt_tokens for each in stats)
    assert computed <= len(PROMPT) + 3 * block_size, "the others compute what fills no block"
    # Decode may have answered before prefill's front has heard that the last chunk is there.
    await until(lambda: pools.prefill.front.handoff.num_requests == (way == "disaggregated"))


async def test_a_call_is_ended_by_its_stream_alone_and_not_by_serve_with_the_http_request(
    start: StartPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = await start()
    asked_for: list[Any] = []

    async def serve(*_: Any) -> None:
        asked_for.append(_serve_request_context.get())

    monkeypatch.setattr(DecodeClient, "serve", serve)
    before = _serve_request_context.set(_RequestContext(_internal_request_id="of HTTP"))  # type: ignore[arg-type]
    stream = pools.backend.generate(greedy("r", PROMPT, 2), lambda: None)
    _serve_request_context.reset(before)
    await until(lambda: asked_for)
    await stream.aclose()
    assert asked_for == [None]
