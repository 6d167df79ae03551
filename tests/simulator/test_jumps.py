"""Steps that pass at once take what they take one by one: the same requests, the same times."""

import random
from dataclasses import replace
from functools import partial

import pytest

from deployments.planner.settings import PlannerSettings
from deployments.simulator import pools
from deployments.simulator.curves import LLAMA_8B_H100, Curves
from deployments.simulator.engine import ModelledEngine
from deployments.simulator.pools import PoolSetup
from deployments.simulator.requests import Request
from deployments.simulator.scaling import Planned
from deployments.simulator.service import Service, Setup

SETTINGS = PlannerSettings(ttft_s=2.0, itl_s=0.1, start_s=5.0)
SLOW = LLAMA_8B_H100.slower(4)


def trace() -> list[Request]:
    draw, at_s, found = random.Random(5), 0.0, list[Request]()
    for _ in range(600):
        at_s += draw.expovariate(8.0)
        prompt, output = draw.lognormvariate(6.0, 1.0), draw.lognormvariate(4.0, 1.0)
        found.append(Request(at_s, 16 + int(prompt), 1 + min(800, int(output))))
    return found


def play(curves: Curves, is_colocated: bool) -> tuple[Service, list[Request]]:
    pool = PoolSetup(curves, start_s=5.0, most=6)
    setup = Setup(replace(pool, initial=2), None if is_colocated else pool, ttft_s=2.0, itl_s=0.1)
    service, requests = Service(setup, Planned(SETTINGS, is_colocated)), trace()
    service.play(requests)
    return service, requests


@pytest.mark.parametrize("is_colocated", [False, True], ids=["apart", "colocated"])
@pytest.mark.parametrize(
    "curves",
    [SLOW, replace(SLOW, num_kv_tokens=12_000), replace(SLOW, context_s=5 * SLOW.context_s)],
    ids=["as measured", "a pool too small", "KV that costs much"],
)
def test_requests_take_as_long_as_where_each_step_is_an_event_of_its_own(
    curves: Curves, is_colocated: bool, monkeypatch: pytest.MonkeyPatch
):
    fast, at_once = play(curves, is_colocated)
    monkeypatch.setattr(pools, "ModelledEngine", partial(ModelledEngine, max_steps=1.0))
    slow, one_by_one = play(curves, is_colocated)
    for ours, theirs in zip(at_once, one_by_one, strict=True):
        assert ours.is_refused == theirs.is_refused
        assert (ours.ttft_s, ours.end_s) == pytest.approx((theirs.ttft_s, theirs.end_s), abs=1e-9)
    assert {name: pool.history for name, pool in fast.pools.items()} == {
        name: pool.history for name, pool in slow.pools.items()
    }
    assert fast.gaps.quantiles((0.5, 0.99)) == pytest.approx(slow.gaps.quantiles((0.5, 0.99)), rel=0.03)
