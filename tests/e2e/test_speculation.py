"""A service whose decode engines guess by a model or a head beside the large one: each token is as without."""

import copy
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from ray import serve
from transformers import PreTrainedModel

from app.config import AppConfig
from app.graph import graph
from deployments.engine.model.load import prepare_model
from deployments.messages import GenerateRequest, SamplingParams
from tests.api.fakes import build_tokenizer
from tests.e2e.conftest import ENGINE_PATIENCE, MODEL_NAME, Service
from tests.engine import eagle3_heads
from tests.engine.driving import build_engine, generate
from tests.engine.families import CPU, random_prompt

NUM_TOKENS = 40
# Long enough that it is under way when its engine is killed.
NUM_STREAMED = 400
WAYS = (("colocated", "draft_model"), ("disaggregated", "draft_model"), ("disaggregated", "eagle3"))
PROMPTS = {f"p{length}": random_prompt(length, seed=length) for length in (5, 40, 150)}
# Three replicas are replaced at once, on a machine that others keep busy.
TIMEOUT_S = 300.0


def like(model: PreTrainedModel) -> PreTrainedModel:
    """Hardly another model, which is often right."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for weights in other.parameters():
            if weights.ndim > 1:
                weights.add_(0.05 * weights.std() * torch.randn_like(weights))
    return other


def save(folder: Path, model: PreTrainedModel) -> str:
    copy.deepcopy(model).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@cache
def answers(num_tokens: int, temperature: float) -> dict[str, tuple[int, ...]]:
    """Of an engine that guesses nothing."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=7)
    loaded = prepare_model(copy.deepcopy(eagle3_heads.target()), "", CPU)
    asked = [GenerateRequest(name, prompt, sampling) for name, prompt in PROMPTS.items()]
    return dict(zip(PROMPTS, generate(build_engine(loaded, num_blocks=500), asked), strict=True))


def configure(mode: str, method: str, folder: Path) -> AppConfig:
    if method == "eagle3":
        guesses = eagle3_heads.save(folder / "head", eagle3_heads.weights())
    else:
        guesses = save(folder / "small", like(eagle3_heads.target()))
    # All guesses are tried, so that some are right and some are wrong whatever the machine does meanwhile.
    speculation = {"method": method, "model": guesses, "is_adaptive": False, "max_drafts": 3}
    small = {"num_cpus": 0.05}  # of those that services of all tests have left
    return AppConfig.model_validate(
        {
            "mode": mode,
            "model": save(folder / "large", eagle3_heads.target()),
            "served_model_name": MODEL_NAME,
            "engine": ENGINE_PATIENCE | {"num_blocks": 500, "block_size": 16},
            "ingress": {"max_ttft_s": 600, "resume_timeout_s": 600},
            "decode": small | {"engine": {"speculation": speculation}, "graceful_shutdown_timeout_s": 1.0},
        }
        | (
            {"prefill": small, "min_remote_prefill_tokens": 32, "parity_check": False}
            if mode == "disaggregated"
            else {}
        )
    )


@pytest.fixture(scope="module")
def all_guessing(
    services: dict[str, Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Service]]:
    """By their names; side by side, as much of a start is waiting."""
    names = {f"{mode}_{method}": (mode, method) for mode, method in WAYS}
    apps = {name: graph(configure(*way, tmp_path_factory.mktemp(name))) for name, way in names.items()}
    serve.run_many([serve.RunTarget(app, name=name, route_prefix=f"/{name}") for name, app in apps.items()])
    url = services["colocated"].url.removesuffix("colocated")
    yield {name: Service(mode, url + name, name) for name, (mode, _) in names.items()}
    for name in names:
        serve.delete(name, _blocking=False)


@pytest.fixture(params=WAYS, ids="-".join)
def guessing(request: pytest.FixtureRequest, all_guessing: dict[str, Service]) -> Service:
    return all_guessing["_".join(request.param)]


def body(name: str, num_tokens: int, temperature: float) -> dict[str, Any]:
    fields = {"model": MODEL_NAME, "prompt": PROMPTS[name], "max_tokens": num_tokens, "ignore_eos": True}
    return fields | {"temperature": temperature, "seed": 7, "return_token_ids": True}


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "drawn"])
def test_tokens_are_those_of_an_engine_that_guesses_nothing(
    guessing: Service, client: httpx.Client, temperature: float
) -> None:
    for name, expected in answers(NUM_TOKENS, temperature).items():
        answer = client.post(f"{guessing.url}/v1/completions", json=body(name, NUM_TOKENS, temperature))
        assert answer.status_code == httpx.codes.OK, answer.text
        assert tuple(answer.json()["choices"][0]["token_ids"]) == expected, name
    (decode,) = guessing.stats("Decode")
    assert decode.engine.drafted_tokens.total > 0
    if "draft_model" in (guessing.name or ""):
        assert decode.engine.accepted_tokens.total > 0
    if guessing.mode == "disaggregated":
        (prefill,) = guessing.stats("Prefill")
        assert prefill.handoff.num_requests > 0 and prefill.engine.drafted_tokens.total == 0


def stream_amid_a_kill(service: Service, victim: int) -> tuple[int, ...]:
    """The tokens of a stream that is under way when its engine is killed."""
    asked = body("p150", NUM_STREAMED, 0.8) | {"stream": True}
    told: list[int] = []
    with httpx.stream("POST", f"{service.url}/v1/completions", json=asked, timeout=TIMEOUT_S) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            if not told:
                os.kill(victim, signal.SIGKILL)
            told += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
    return tuple(told)


@pytest.fixture(scope="module")
def resumed(all_guessing: dict[str, Service]) -> dict[str, tuple[int, ...]]:
    """Tokens of a stream of each service, all of which lose their decode engine at once."""
    asked = [service.pool("Decode").broadcast("engine_info") for service in all_guessing.values()]
    victims = [info.pid for infos in asked for info in infos.results(timeout_s=TIMEOUT_S)]
    with ThreadPoolExecutor(len(victims)) as threads:
        return dict(zip(all_guessing, threads.map(stream_amid_a_kill, all_guessing.values(), victims), strict=True))


def test_a_stream_goes_on_token_for_token_when_its_decode_engine_is_killed(
    guessing: Service, resumed: dict[str, tuple[int, ...]]
) -> None:
    (expected,) = [tokens for name, tokens in answers(NUM_STREAMED, 0.8).items() if name == "p150"]
    assert resumed[guessing.name or ""] == expected
    (successor,) = guessing.stats("Decode")
    assert successor.engine.drafted_tokens.total > 0, "the one that took its place has guessed as well"
