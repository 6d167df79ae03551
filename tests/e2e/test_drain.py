"""Pools shrink under load: who is removed takes nothing new, what it holds ends well, and clients see only time."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from ray import serve

from app.config import AppConfig
from tests.bench.chaos import scaling
from tests.bench.chaos.load import Client, Ending, Record
from tests.bench.chaos.probes import Call, Probe, build_probes
from tests.e2e.conftest import MODEL_NAME, Service
from tests.e2e.waiting import wait_idle
from tests.waiting import wait_until

NAME = "drain"
# Long enough to be handed over, and to be decoded for longer than a removed decode replica has.
PROMPT_TOKENS, MAX_TOKENS = (100, 400), (90, 120)
NUM_PROBES = 8
DECODE_SHUTDOWN_S = 1.0
# Prefill's hand-offs may all end; nothing here takes as long.
PREFILL_SHUTDOWN_S = 120.0
# What Serve takes beside that to tell replicas to go, and to see that they have, on a busy machine.
SERVE_S = 30.0


@dataclass(frozen=True)
class Scaled:
    """An application whose pools have as many replicas as a file says.

    Attributes:
        service: the application.
        path: of the file.
    """

    service: Service
    path: Path

    def scale(self, num_replicas: int) -> None:
        self.path.write_text(json.dumps({"Prefill": num_replicas, "Decode": num_replicas}))


@pytest.fixture
def scaled(services: dict[str, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scaled]:
    scaled = Scaled(
        Service("disaggregated", services["colocated"].url.replace("colocated", NAME), NAME), tmp_path / "n"
    )
    scaled.scale(2)
    monkeypatch.setenv(scaling.VARIABLE, str(scaled.path))
    size = {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 2}
    args = AppConfig.model_validate(
        {
            "served_model_name": MODEL_NAME,
            "min_remote_prefill_tokens": 64,
            "parity_check": False,
            "engine": {"num_blocks": 256, "max_model_len": 1024},
            "ingress": {"max_ttft_s": 600},
            "prefill": size | {"graceful_shutdown_timeout_s": PREFILL_SHUTDOWN_S},
            "decode": size | {"graceful_shutdown_timeout_s": DECODE_SHUTDOWN_S},
        }
    )
    serve.run(scaling.graph(args), name=NAME, route_prefix=f"/{NAME}")
    yield scaled
    serve.delete(NAME)


def num_replicas(deployment: str) -> int:
    """Those that stop included."""
    return sum(serve.status().applications[NAME].deployments[deployment].replica_states.values())


def num_resumed(service: Service) -> float:
    text = httpx.get(f"{service.url}/metrics").text
    (value,) = re.findall(r"^kvrelay_requests_resumed_total (\S+)$", text, re.MULTILINE)
    return float(value)


async def ask(service: Service, probes: list[Probe], disturb: Callable[[], None] | None = None) -> list[Record]:
    """Stream every probe at once; `disturb` when half of them have tokens and both engines of each pool work."""
    async with Client(service.url, MODEL_NAME) as client:
        streams = [asyncio.create_task(client.send(Call(probe))) for probe in probes]
        if disturb is not None:
            while sum(bool(record.token_ids) for record in client.records) < NUM_PROBES / 2:
                assert not all(stream.done() for stream in streams)
                await asyncio.sleep(0.02)
            assert all(row.engine.num_used_blocks for row in await asyncio.to_thread(service.stats, "Decode"))
            await asyncio.to_thread(disturb)
        return [await stream for stream in streams]


def test_pools_that_shrink_lose_no_request_and_no_token(scaled: Scaled) -> None:
    service = scaled.service
    probes = build_probes(3, NUM_PROBES, PROMPT_TOKENS, MAX_TOKENS)
    expected = {record.call.probe.number: record.token_ids for record in asyncio.run(ask(service, probes))}
    wait_idle(service, 30)
    before = num_resumed(service)
    begun: list[float] = []

    def shrink() -> None:
        begun.append(time.monotonic())
        scaled.scale(1)
        wait_until(lambda: num_replicas("Decode") <= 1, DECODE_SHUTDOWN_S + SERVE_S)

    records = asyncio.run(ask(service, probes, shrink))
    assert {record.ending for record in records} == {Ending.WHOLE}, [record.error for record in records]
    assert {record.call.probe.number: record.token_ids for record in records} == expected
    assert num_resumed(service) > before, "the removed decode replica had more to do than its time allowed"
    wait_until(lambda: num_replicas("Prefill") <= 1, begun[0] + PREFILL_SHUTDOWN_S - time.monotonic())
    wait_idle(service, 30)
