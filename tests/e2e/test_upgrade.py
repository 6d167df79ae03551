"""An application gets another model and other numbers while it is used: no request is lost, none mixes two models."""

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from app.config import AppConfig
from app.graph import graph
from tests.api.fakes import build_tokenizer
from tests.bench.chaos import load
from tests.bench.chaos.load import Client, Ending, Record, send_steadily
from tests.bench.chaos.probes import Call, Deck, Probe, build_probes
from tests.e2e.conftest import ENGINE_PATIENCE, MODEL_NAME, Service
from tests.engine.families import build_model

APP = "upgraded"
# Long enough to be handed over; ids that the models know.
PROMPT_TOKENS, MAX_TOKENS, VOCAB_SIZE = (100, 400), (12, 40), 256
NUM_PROBES, RATE = 16, 2.0
# For what Serve has to start and stop meanwhile, on a machine that others keep busy.
PATIENCE_S = 600.0


def save(folder: Path, family: str) -> str:
    """A small model; both have one tokenizer."""
    copy.deepcopy(build_model(family)).save_pretrained(folder / family)
    build_tokenizer().save_pretrained(folder / family)
    return str(folder / family)


def deploy(model: str, num_decode: int) -> None:
    """Return when the application serves."""
    small: dict[str, Any] = {"num_cpus": 0.1, "graceful_shutdown_timeout_s": PATIENCE_S}
    args = AppConfig.model_validate(
        {
            "model": model,
            "served_model_name": MODEL_NAME,
            "min_remote_prefill_tokens": 64,
            "parity_check": False,
            "planner": {"enabled": True},
            "engine": ENGINE_PATIENCE | {"num_blocks": 500, "block_size": 16},
            "ingress": {"max_ttft_s": PATIENCE_S, "graceful_shutdown_timeout_s": PATIENCE_S},
            "prefill": small,
            "decode": small | {"min_replicas": num_decode, "max_replicas": num_decode},
        }
    )
    serve.run(graph(args), name=APP, route_prefix=f"/{APP}")


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [save(tmp_path, family) for family in ("llama", "qwen3")]


@pytest.fixture
def service(services: dict[str, Service], models: list[str]) -> Iterator[Service]:
    """With the first model."""
    deploy(models[0], num_decode=1)
    yield Service("disaggregated", services["colocated"].url.removesuffix("colocated") + APP, APP)
    serve.delete(APP, _blocking=False)


async def learn(service: Service, probes: list[Probe]) -> dict[int, list[int]]:
    """The tokens of each probe, by the model that is served now."""
    async with Client(service.url, MODEL_NAME) as client:
        records = await client.send_all([Call(probe) for probe in probes], num_clients=4)
    assert {record.ending for record in records} == {Ending.WHOLE}
    return {record.call.probe.number: record.token_ids for record in records}


async def ask_during(service: Service, probes: list[Probe], model: str, num_decode: int) -> list[Record]:
    """Ask steadily, from before the application gets another model and number until it has them."""
    ended = asyncio.Event()
    async with Client(service.url, MODEL_NAME) as client:
        asking = asyncio.create_task(send_steadily(client, Deck(probes, seed=5), RATE, 5, ended))
        await client.next_stream(PATIENCE_S)
        await asyncio.to_thread(deploy, model, num_decode)
        ended.set()
        await asking
        return client.records


def test_another_model_and_another_number_of_replicas_lose_no_request(
    service: Service, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "ANSWER_TIMEOUT_S", PATIENCE_S)
    probes = [
        replace(probe, prompt=tuple(token % VOCAB_SIZE for token in probe.prompt))
        for probe in build_probes(3, NUM_PROBES, PROMPT_TOKENS, MAX_TOKENS)
    ]
    old = asyncio.run(learn(service, probes))
    records = asyncio.run(ask_during(service, probes, models[1], num_decode=2))
    new = asyncio.run(learn(service, probes))
    assert all(old[probe.number] != new[probe.number] for probe in probes)
    assert {record.ending for record in records} == {Ending.WHOLE}, [record.error for record in records]
    answers = [(record.token_ids, record.call.probe.number) for record in records]
    assert [number for tokens, number in answers if tokens not in (old[number], new[number])] == []
    # The planner goes on from the numbers that were set.
    assert serve.status().applications[APP].deployments["Decode"].replica_states == {"RUNNING": 2}
