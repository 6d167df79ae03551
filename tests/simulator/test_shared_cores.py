"""What a service whose engines share cores teaches of engines that are alone."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from deployments.load.held import Held
from deployments.load.reading import Reading
from deployments.simulator.curves import Curves
from deployments.simulator.pools import PoolSetup, PoolState
from deployments.simulator.requests import Request
from deployments.simulator.scaling import Fixed
from deployments.simulator.service import Service, Setup
from tests.bench.simulator.alone import Means, alone, answer_beside_prompts
from tests.bench.simulator.teacher import Snapshot, Teacher, learn_slowdown

TRUE = Curves(step_s=0.02, token_s=0.003, sequence_s=0.002, context_s=0.0, handoff_s=0.02, max_num_batched_tokens=128)
SLOWDOWN = 1.6


class Watching(Fixed):
    """Takes a snapshot of a modelled service each second."""

    period_s = 1.0

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def decide(
        self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int, held: Held
    ) -> dict[str, int]:
        engines = {(pool, name): stats for pool, read in reading.pools.items() for name, stats in read.items()}
        self.snapshots.append(Snapshot(engines, at_s=at_s))
        return super().decide(reading, pools, at_s, num_refused, held)


def service_of(decode: Curves, prefill: Curves, slowdown: float) -> Setup:
    pools = PoolSetup(decode, most=1), PoolSetup(prefill, most=1)
    return Setup(*pools, ttft_s=60.0, itl_s=1.0, min_remote_tokens=16, shared_slowdown=slowdown)


def play(setup: Setup, trace: Sequence[Request]) -> tuple[list[Snapshot], tuple[float, ...]]:
    """What was seen of it; p50 and p99 of first tokens and of gaps."""
    watching = Watching()
    service, requests = Service(setup, watching), [replace(request) for request in trace]
    service.play(requests)
    ttft_s = sorted(request.ttft_s or 0.0 for request in requests)
    p50, p99 = (ttft_s[int(share * len(ttft_s))] for share in (0.5, 0.99))
    return watching.snapshots, (p50, p99, *service.gaps.quantiles((0.5, 0.99)))


def step_s(curves: Curves, num_tokens: int) -> float:
    """Of prompts alone."""
    return curves.step_s + num_tokens * curves.token_s


def chats() -> list[Request]:
    draw, at_s, trace = random.Random(3), 0.0, list[Request]()
    for _ in range(200):
        at_s += draw.expovariate(0.8)
        trace.append(Request(at_s, draw.randint(32, 160), draw.randint(16, 48)))
    return trace


@pytest.mark.parametrize("slowdown", [1.0, SLOWDOWN])
def test_one_answer_beside_prompts_tells_by_how_much_engines_slow_each_other(slowdown: float):
    trace = [Request(one.at_s or 0.0, len(one.prompt), one.output_tokens) for one in answer_beside_prompts()]
    trace.sort(key=lambda request: request.at_s)
    setup = service_of(TRUE, TRUE, slowdown)
    watch, _ = play(setup, [*trace, Request(40.0, 16, 1)])  # it is watched until the last one has come
    assert learn_slowdown([watch]) == pytest.approx(slowdown, rel=0.02)


def test_without_seconds_that_tell_of_both_nothing_is_learned():
    watch, _ = play(service_of(TRUE, TRUE, SLOWDOWN), [Request(0.0, 32, 100), Request(10.0, 16, 1)])
    with pytest.raises(ValueError, match="0 of both"):
        learn_slowdown([watch])


def test_what_engines_take_that_are_alone_is_told_from_what_they_took_beside_each_other():
    trace = chats()
    watch, true = play(service_of(TRUE, TRUE, SLOWDOWN), trace)
    teacher = Teacher([watch])
    prefill = replace(teacher.curves("prefill", TRUE.max_num_batched_tokens), handoff_s=TRUE.handoff_s)
    decode = teacher.curves("decode", TRUE.max_num_batched_tokens, prefill.token_s)
    setup = service_of(decode, prefill, 1.0)

    def means(setup: Setup) -> Means:
        return Teacher([play(setup, trace)[0]]).means

    found = alone(setup, SLOWDOWN, teacher.means, means)
    assert found.prefill is not None
    assert step_s(prefill, 100) > 1.2 * step_s(TRUE, 100)
    assert step_s(found.prefill.curves, 100) == pytest.approx(step_s(TRUE, 100), rel=0.05)
    assert found.decode.curves.step_s == pytest.approx(TRUE.step_s, rel=0.08)
    assert play(found, trace)[1] == pytest.approx(true, rel=0.06)
