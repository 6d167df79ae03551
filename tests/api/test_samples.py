"""`n` and `best_of`: several choices of one prompt, with seeds of their own, the prompt computed once."""

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from deployments.api.sampling import seed_of
from deployments.errors import EngineDeadError
from deployments.messages import FinishReason
from tests.api.fakes import CHAT, COMPLETIONS, FakeBackend, Step, events_of, post

LENGTH = FinishReason.LENGTH


def by_sample(*scripts: Sequence[Step]) -> FakeBackend:
    """A backend that plays a script for each sample of a prompt."""
    return FakeBackend(lambda request: scripts[int(request.request_id.rpartition("-")[2]) % len(scripts)])


async def answer_of(path: str, backend: FakeBackend, **fields: Any) -> Any:
    answer = await post(backend, path, **fields)
    assert answer.status_code == 200, answer.text
    return orjson.loads(answer.content)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_n_choices_have_seeds_that_follow_each_other(path: str) -> None:
    backend = by_sample(["a", LENGTH], ["b", LENGTH], ["c", LENGTH])
    answer = await answer_of(path, backend, n=3, seed=7)
    texts = [c["text"] if path == COMPLETIONS else c["message"]["content"] for c in answer["choices"]]
    assert texts == ["a", "b", "c"] and [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in backend.requests) == [7, 8, 9]
    assert len({request.prompt_token_ids for request in backend.requests}) == 1


def test_the_seed_after_the_last_one_is_the_first() -> None:
    assert [seed_of(2**63 - 2, sample) for sample in range(3)] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert seed_of(-3, 2) == -1


async def test_choices_of_several_prompts_come_prompt_by_prompt() -> None:
    backend = FakeBackend(
        lambda request: [[*request.prompt_token_ids], [*b"01"][request.sampling.seed - 5 :][:1], LENGTH]
    )
    answer = await answer_of(COMPLETIONS, backend, prompt=["x", "y"], n=2, seed=5, return_token_ids=True)
    assert [choice["text"] for choice in answer["choices"]] == ["x0", "x1", "y0", "y1"]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[120], [120], [121], [121]]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stream_has_the_chunks_of_all_choices(path: str) -> None:
    backend = by_sample(["a", "b", LENGTH], ["c", LENGTH])
    fields: dict[str, Any] = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = list(events_of((await post(backend, path, **fields)).content))
    texts = ["", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "")
    assert texts == ["ab", "c"] and done == "[DONE]"
    if path == CHAT:
        roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
        assert sorted(roles) == [0, 1]
    assert usage["usage"]["completion_tokens"] == 3


async def test_a_prompt_that_is_sampled_often_counts_once() -> None:
    backend = by_sample(["ab", LENGTH], ["c", LENGTH], ["d", LENGTH])
    backend.num_cached_tokens = 2
    usage = (await answer_of(COMPLETIONS, backend, prompt="xyz", n=3))["usage"]
    assert usage == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_the_other_samples_begin_when_the_first_has_two_tokens() -> None:
    is_second_due = asyncio.Event()
    backend = by_sample(["a", is_second_due, "b", LENGTH], ["c", LENGTH], ["d", LENGTH])
    answer = asyncio.create_task(answer_of(COMPLETIONS, backend, n=3))
    await backend.until(lambda: backend.num_outputs.total() == 1)
    assert len(backend.requests) == 1, "the first token may come before the KV"
    is_second_due.set()
    assert [choice["text"] for choice in (await answer)["choices"]] == ["ab", "c", "d"]


async def test_the_other_samples_begin_when_the_first_ends_with_one_token() -> None:
    answer = await answer_of(COMPLETIONS, by_sample(["a", LENGTH], ["b", LENGTH]), n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["a", "b"]


async def test_a_first_sample_that_fails_ends_the_call() -> None:
    backend = by_sample([EngineDeadError("gone")], ["b", LENGTH])
    assert (await post(backend, COMPLETIONS, n=2)).status_code >= 500
    assert not backend.running


async def test_the_best_are_those_of_the_greatest_mean_logprob() -> None:
    """The fakes' logprob falls with the token id."""
    backend = by_sample(["zzz", LENGTH], ["a", LENGTH], ["bz", LENGTH], ["b", LENGTH])
    answer = await answer_of(COMPLETIONS, backend, n=2, best_of=4)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "a"), (1, "b")]
    assert answer["choices"][0]["logprobs"] is None and answer["usage"]["completion_tokens"] == 7


async def test_a_prompt_is_scored_once_for_all_its_choices() -> None:
    backend = by_sample(["x", LENGTH], ["y", LENGTH])
    answer = await answer_of(COMPLETIONS, backend, prompt="ab", n=2, echo=True, logprobs=0)
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [["a", "b", "x"], ["a", "b", "y"]]
    scored = [request.num_prompt_logprobs for request in backend.requests]
    assert scored == [0, None]
    body = (await post(backend, COMPLETIONS, prompt="ab", n=2, echo=True, logprobs=0, stream=True)).content
    chunks = {e["choices"][0]["index"]: e["choices"][0]["logprobs"]["tokens"] for e in events_of(body) if e != "[DONE]"}
    assert chunks == {0: ["a", "b", "x"], 1: ["a", "b", "y"]}
