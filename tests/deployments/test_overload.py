"""What the ingress adds to admission: its numbers, and Serve's own limits as an overload like any other."""

import asyncio
import time

import pytest
from ray.serve.exceptions import BackPressureError

from deployments import pool_backend
from deployments.engine.stats import EngineStats
from deployments.errors import OverloadedError
from deployments.load.admission import Admission, Bounds
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.messages import Priority
from deployments.ray_errors import as_ours
from deployments.replica_stats import HandoffStats, ReplicaStats
from deployments.routing.pools import PoolRouters
from deployments.routing.settings import RoutingSettings
from deployments.telemetry.client_stats import ClientStats
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.metrics import render
from deployments.telemetry.peers import IngressReading
from tests.deployments.conftest import StartPools
from tests.deployments.pools import Pools
from tests.engine.driving import greedy
from tests.engine.families import random_prompt
from tests.waiting import PATIENCE_S


def test_a_limit_of_serve_is_an_overload_with_its_numbers() -> None:
    error = as_ours(BackPressureError(num_queued_requests=70, max_queued_requests=64))
    assert isinstance(error, OverloadedError)
    assert "max_queued_requests=64" in str(error)


def test_refusals_are_counted_by_reason_and_priority() -> None:
    admission = Admission(Bounds(1.0, 100, None), lambda: 0.0)
    admission.admit([60], Priority.LOW, b"")
    for _ in range(2):
        with pytest.raises(OverloadedError):
            admission.admit([60], Priority.LOW, b"")
    ingress = IngressStats.of("i0", ClientStats(), admission, PoolRouters(RoutingSettings(), None))
    text = render({}, IngressReading([ingress])).decode()
    assert 'kvrelay_refusals_total{ingress="i0",priority="low",reason="queued_tokens"} 2.0' in text
    assert 'kvrelay_estimated_queued_tokens{ingress="i0",pool="decode"} 60.0' in text
    assert "kvrelay_prefill_speed{" not in text, "not measured yet"


async def test_a_reading_of_real_engines_gives_the_speed_of_each_pool() -> None:
    pools = await Pools.start(min_tokens=50)
    for name, length in (("long", 100), ("short", 20)):
        request = greedy(name, random_prompt(length, seed=length), 2)
        ticket = await pools.backend.admit([request], b"")
        async for _ in pools.generate(request):
            pass
        ticket.close()
    prefill, decode = (await pools.prefill.engine.stats()), (await pools.decode.engine.stats())
    assert (prefill.prompt_tokens, decode.prompt_tokens) == (100, 20)
    assert prefill.prefill_s > 0 and decode.prefill_s > 0
    assert (prefill.prefill_steps, decode.prefill_steps) == (1, 1)
    assert (decode.finished, decode.num_remote_prompt_tokens) == (2, 0)
    assert pools.backend.own_stats().num_readings == 0
    await pools.read()
    assert pools.backend.own_stats().num_readings == 1
    await pools.stop()


async def test_what_a_neighbour_has_given_up_since_the_last_reading_refuses_nobody(
    start: StartPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = await start()
    request = greedy("ours", random_prompt(100, seed=1), 2)
    full = EngineStats(num_queued_prompt_tokens=10_000, max_num_batched_tokens=32, num_receivers=2)
    said = {PREFILL: [ReplicaStats("p0", full, HandoffStats())], DECODE: [ReplicaStats("d0", full, HandoffStats())]}
    pools.backend.take(Reading.of(said, time.monotonic() - 0.5))
    with pytest.raises(OverloadedError, match="at most 8000 prompt tokens may wait"):
        await pools.backend.admit([request], b"")  # nobody reads
    monkeypatch.setattr(pool_backend, "_REFRESH_TIMEOUT_S", PATIENCE_S)
    watch = asyncio.create_task(pools.backend.watch.run())
    (await pools.backend.admit([request], b"")).close()
    watch.cancel()
