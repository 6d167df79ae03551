"""OpenAI's own client asks real engines for answers of a form, however they are served.

Disaggregated, colocated, and gone on with by another decode engine after the death of the first.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import validate

from deployments import grammars
from deployments.api.http import build_app
from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine_builder import assemble_engine
from deployments.errors import InvalidRequestError
from deployments.grammars import read_vocabulary
from deployments.messages import GenerateRequest, Grammar, ModelInfo, SamplingParams
from tests.api.fakes import build_codec, client_at, serving
from tests.deployments.conftest import StartPools
from tests.deployments.pools import PROMPT
from tests.engine.families import VOCAB_SIZE
from tests.engine.grammars import END, load_with_tokenizer, regex
from tests.engine.insides import compile_grammars_by

# A model that knows no text writes what it may: bounds make that short.
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "bc"]},
        "parts": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{3,6}$"},
            "minItems": 6,
            "maxItems": 8,
        },
    },
    "required": ["kind", "parts"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
PATTERN = "[a-f]{30}(-[0-9]{2}){2}"
INFO = ModelInfo("tiny", "", max_model_len=512, vocab_size=VOCAB_SIZE, eos_token_ids=(END,))
# Needs a state of the automaton for each letter.
OUTGROWN, MAX_STATES = "[a-z]{150}", 100
QUESTION = "The quick brown fox jumps over the lazy dog, and then it sleeps."


def test_an_engine_reads_its_vocabulary_before_anyone_waits_for_its_tokens(tmp_path: Path) -> None:
    model = load_with_tokenizer("llama")
    shutil.copy(Path(model.path) / "tokenizer.json", tmp_path)
    assemble_engine(replace(model, path=str(tmp_path), eos_token_ids=(END,)), EngineConfig(num_blocks=8))
    num_read = read_vocabulary.cache_info().misses
    read_vocabulary(str(tmp_path), model.vocab_size, (END,))
    assert read_vocabulary.cache_info().misses == num_read


@pytest.mark.parametrize("way", ["disaggregated", "colocated", "resumed"])
async def test_answers_have_their_form_and_are_the_same_however_they_are_served(start: StartPools, way: str) -> None:
    pools = await start(min_tokens=10_000 if way == "colocated" else 16, num_decode=2)
    # Else all of the text may be there when its beginning is read.
    pools.decode.engine.stop_at(has_begun if way == "resumed" else None)
    async with (
        serving(build_app(pools.backend, build_codec(), INFO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.completions.create(
            model="tiny", prompt=QUESTION, max_tokens=60, seed=1, stream=True, extra_body={"guided_regex": PATTERN}
        )
        text, reason = "", None
        async for chunk in stream:
            text, reason = text + chunk.choices[0].text, chunk.choices[0].finish_reason or reason
            if way == "resumed" and len(text) > 3 and pools.decode.engine.death is None:
                pools.decode.engine.die()
        assert reason == "stop" and re.fullmatch(PATTERN, text)
        answers = [
            await client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": QUESTION}],
                seed=seed,
                response_format=FORMAT,
            )
            for seed in (1, 1, 2)
        ]
    contents = [answer.choices[0].message.content or "" for answer in answers]
    assert contents[0] == contents[1] != contents[2]
    for answer, content in zip(answers, contents, strict=True):
        assert answer.choices[0].finish_reason == "stop"
        validate(json.loads(content), SCHEMA)
    resumed = pools.backend.clients.stats.num_resumed
    assert bool(resumed) is (way == "resumed")


@pytest.mark.parametrize("way", ["disaggregated", "colocated"])
async def test_a_grammar_that_outgrows_its_bounds_is_refused_and_no_engine_tries_it_again(
    start: StartPools, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = await start(min_tokens=10_000 if way == "colocated" else 16, num_prefill=2, num_decode=2)
    monkeypatch.setattr(grammars, "_MAX_LEXER_STATES", MAX_STATES)
    asked = {"model": "tiny", "prompt": QUESTION, "max_tokens": 200, "guided_regex": OUTGROWN}
    async with serving(build_app(pools.backend, build_codec(), INFO)) as url, client_at(url) as client:
        whole = await client.post("/v1/completions", json=asked)
        stream = await client.post("/v1/completions", json=asked | {"stream": True})
    error = whole.json()["error"]
    assert (whole.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "guided_regex")
    assert "too many states" in error["message"]
    *events, last = [json.loads(line.removeprefix("data: ")) for line in stream.text.splitlines() if line]
    assert stream.status_code == 200 and events and last == {"error": error}
    assert sum(len(engine.added) for engine in pools.engines) == 2, "each call is tried once"
    await pools.wait_idle()


@pytest.mark.parametrize("way", ["disaggregated", "colocated"])
async def test_a_prompt_whose_grammar_no_engine_can_follow_is_given_to_one_alone(start: StartPools, way: str) -> None:
    pools = await start(min_tokens=10_000 if way == "colocated" else 16, num_prefill=2, num_decode=2)
    # Decode engines see nothing wrong with it, so that the prefill engine is the one to find out.
    for engine in pools.engines[2:] if way == "disaggregated" else ():
        await engine.run(follow_anything)
    sampling = SamplingParams(8, stop_token_ids=(END,), grammar=Grammar("no grammar", (END,), "guided_grammar"))
    with pytest.raises(InvalidRequestError, match="guided_grammar cannot be followed"):
        await pools.collect(GenerateRequest("r", PROMPT, sampling))
    assert [len(engine.added) for engine in pools.engines] == [0, 0, 1, 0]
    handoffs = [replica.front.handoff.num_failures for replica in pools.prefills]
    assert handoffs == ([1, 0] if way == "disaggregated" else [0, 0])
    await pools.wait_idle()


def has_begun(engine: Engine) -> bool:
    """Some letters of the answer are drawn."""
    return engine.stats().generated_tokens >= 8


def follow_anything(engine: Engine) -> None:
    compile_grammars_by(engine, lambda compile_grammar, _, token_ids: compile_grammar(regex(PATTERN), token_ids))
