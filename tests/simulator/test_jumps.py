"""Steps that pass at once take what they take one by one: the same requests, the same times."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from deployments.planner.settings import PlannerSettings
from deployments.simulator import pools
from deployments.simulator.curves import LLAMA_8B_H100, Curves
from deployments.simulator.engine import ModelledEngine
from deployments.simulator.pools import PoolSetup
from deployments.simulator.requests import Request
from deployments.simulator.scaling import Fixed, Planned
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


def play(curves: Curves, is_colocated: bool, is_planned: bool, slowdown: float = 1.0) -> tuple[Service, list[Request]]:
    pool = PoolSetup(curves, start_s=5.0, most=6)
    decode = replace(pool, initial=2 if is_planned else 4)
    setup = Setup(decode, None if is_colocated else pool, ttft_s=2.0, itl_s=0.1, shared_slowdown=slowdown)
    service, requests = Service(setup, Planned(SETTINGS, is_colocated) if is_planned else Fixed()), trace()
    service.play(requests)
    return service, requests


def both_ways(
    curves: Curves, is_colocated: bool, is_planned: bool, monkeypatch: pytest.MonkeyPatch, slowdown: float = 1.0
) -> tuple[tuple[Service, list[Request]], tuple[Service, list[Request]]]:
    """With steps that pass at once, and with an event for each."""
    fast = play(curves, is_colocated, is_planned, slowdown)
    monkeypatch.setattr(pools, "ModelledEngine", partial(ModelledEngine, max_steps=1.0))
    return fast, play(curves, is_colocated, is_planned, slowdown)


@pytest.mark.parametrize(
    ("curves", "slowdown"),
    [
        (SLOW, 1.0),
        (replace(SLOW, num_kv_tokens=12_000), 1.0),
        (replace(SLOW, context_s=5 * SLOW.context_s), 1.0),
        (SLOW, 1.2),
        (replace(SLOW, context_s=5 * SLOW.context_s), 1.2),
    ],
    ids=["as measured", "a pool too small", "KV that costs much", "shared cores", "both"],
)
def test_requests_take_as_long_as_where_each_step_is_an_event_of_its_own(
    curves: Curves, slowdown: float, monkeypatch: pytest.MonkeyPatch
):
    (fast, at_once), (slow, one_by_one) = both_ways(curves, True, False, monkeypatch, slowdown)
    for ours, theirs in zip(at_once, one_by_one, strict=True):
        assert ours.is_refused == theirs.is_refused
        assert (ours.ttft_s, ours.end_s) == pytest.approx((theirs.ttft_s, theirs.end_s), abs=1e-9)
    assert fast.gaps.quantiles((0.5, 0.99)) == pytest.approx(slow.gaps.quantiles((0.5, 0.99)), rel=0.03)


@pytest.mark.parametrize("is_colocated", [False, True], ids=["apart", "colocated"])
def test_what_is_chosen_by_learned_costs_differs_little(is_colocated: bool, monkeypatch: pytest.MonkeyPatch):
    # What is learned of steps is a mean over many where they pass at once, so that near a bound another number of
    # replicas may be chosen, or who computes a prompt.
    (fast, at_once), (slow, one_by_one) = both_ways(SLOW, is_colocated, True, monkeypatch)
    for name, pool in fast.pools.items():
        wanted, expected = ([target for _, target, _ in one.history] for one in (pool, slow.pools[name]))
        assert sum(wanted) == pytest.approx(sum(expected), rel=0.05)
        assert max(abs(a - b) for a, b in zip(wanted, expected, strict=False)) <= 1
    ours, theirs = (np.array([one.end_s for one in requests]) for requests in (at_once, one_by_one))
    assert np.median(np.abs(ours - theirs)) < 0.1
