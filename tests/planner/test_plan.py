"""The planner's decisions, over loads of every kind."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.planner.flow import Flow, Rate
from deployments.planner.need import need_of_answers, need_of_prompts, prompt_engines
from deployments.planner.observation import Answers, GapCurve, Observation, PoolSeen, Prompts, Tail
from deployments.planner.plan import hold, plan
from deployments.planner.settings import PlannerSettings
from deployments.planner.state import Bounds, Memory

SETTINGS = PlannerSettings(ttft_s=2.0, itl_s=0.05, hold_s=60.0)
GAPS = GapCurve(step_s=0.006, sequence_s=0.0003)
START_S = 20.0

rates = st.floats(0, 200)
loads = st.tuples(rates, st.floats(0, 200_000), st.integers(0, 500), st.integers(0, 500))


def steady(rate: float) -> Rate:
    return Rate(rate, rate, rate)


def seen(
    at_s=0.0,
    requests=0.0,
    prompt_tokens=1000.0,
    output_tokens=200.0,
    queued_tokens=0.0,
    num_waiting=0,
    num_running=0,
    prefill=1,
    decode=1,
    start_s=START_S,
    tail=None,
) -> Observation:
    """Both pools under a load of requests that are all alike."""
    tokens = Rate(requests * prompt_tokens, requests * prompt_tokens, requests * prompt_tokens**2)
    prompts = Prompts(tokens, 0.8, queued_tokens, token_s=2e-4)
    answers = Answers(steady(requests), output_tokens, GAPS, num_running, num_waiting, max_seqs=128, kv_use=0.2)
    return Observation(
        at_s, PoolSeen(decode, start_s, answers=answers, tail=tail or Tail()), PoolSeen(prefill, start_s, prompts)
    )


def decide(load, own=SETTINGS, most=1000, start=(1, 1)):
    """What a planner that remembers nothing decides."""
    requests, queued_tokens, num_running, num_waiting = load
    bounds = Bounds(1, most, start[0]), Bounds(1, most, start[1])
    observation = seen(
        requests=requests,
        queued_tokens=queued_tokens,
        num_running=num_running,
        num_waiting=num_waiting,
        decode=start[0],
        prefill=start[1],
    )
    return plan(observation, bounds, own, Memory())[0]


class Service:
    """Pools that follow the planner, each new replica once it has started."""

    def __init__(self, start_s=START_S, most=50) -> None:
        self.start_s, self.most = start_s, most
        self.memory, self.targets = Memory(), (1, 1)
        self.coming: list[tuple[float, int, int]] = []
        self.ready = [1, 1]
        self.now_s = 0.0

    def step(self, **load) -> None:
        """Two seconds pass."""
        self.now_s += 2.0
        for at_s, pool, count in [c for c in self.coming if c[0] <= self.now_s]:
            self.ready[pool] = min(self.targets[pool], self.ready[pool] + count)
            self.coming.remove((at_s, pool, count))
        now = seen(at_s=self.now_s, decode=self.ready[0], prefill=self.ready[1], start_s=self.start_s, **load)
        decided, self.memory = plan(now, bounds_of(self.targets, self.most), SETTINGS, self.memory)
        for pool, (count, target) in enumerate(zip((decided.decode, decided.prefill), self.targets, strict=True)):
            if count > target:
                self.coming.append((self.now_s + self.start_s, pool, count - target))
            self.ready[pool] = min(self.ready[pool], count)
        self.targets = decided.decode, decided.prefill

    def run(self, seconds: float, **load) -> None:
        for _ in range(int(seconds / 2)):
            self.step(**load)


def bounds_of(targets: tuple[int, int], most: int) -> tuple[Bounds, Bounds]:
    return Bounds(1, most, targets[0]), Bounds(1, most, targets[1])


@given(loads, st.integers(2, 60), st.integers(1, 20), st.floats(0.5, 4), st.floats(0.5, 4))
def test_the_plan_keeps_the_bounds_and_the_budget(load, budget, most, prefill_cost, decode_cost):
    costs = {"prefill_cost": prefill_cost, "decode_cost": decode_cost}
    own = SETTINGS.model_copy(update={"max_cost": budget + 6.0} | costs)
    decided = decide(load, own, most)
    assert 1 <= decided.decode <= most and 1 <= decided.prefill <= most
    assert decided.decode * decode_cost + decided.prefill * prefill_cost <= own.max_cost + 1e-6


@given(loads, st.floats(1, 3), st.floats(1, 3), st.integers(0, 200), st.integers(0, 200))
def test_more_load_never_means_fewer_replicas(load, more_requests, more_tokens, more_running, more_waiting):
    requests, queued, running, waiting = load
    more = requests * more_requests, queued * more_tokens, running + more_running, waiting + more_waiting
    less, greater = decide(load), decide(more)
    assert greater.prefill >= less.prefill
    # A pool that runs more sequences at the same KV use shows that they are smaller.
    if more_running == 0:
        assert greater.decode >= less.decode


@given(st.floats(0.1, 50), st.floats(0, 100), st.floats(0.1, 10), st.sampled_from([0.9, 0.95, 0.99]))
def test_a_stricter_tail_needs_more_engines_than_the_mean_does(work, variance, wait_s, quantile):
    engines = prompt_engines(work, variance, wait_s, quantile)
    assert engines > work
    assert engines <= prompt_engines(work, variance, wait_s, 0.995)
    assert engines >= prompt_engines(work, variance, 2 * wait_s, quantile)


@settings(max_examples=8, deadline=None)
@given(st.floats(1, 60), st.integers(0, 2**31))
def test_steady_noisy_load_makes_no_pool_flap(requests, seed):
    draw = random.Random(seed)
    flow, memory, targets, history = Flow(2.0), Memory(), (1, 1), []
    for i in range(700):
        flow.add(_poisson(draw, requests * 2), 2.0)
        now = _of_rate(2.0 * i, flow.rate, targets)
        decided, memory = plan(now, bounds_of(targets, 50), SETTINGS, memory)
        targets = decided.decode, decided.prefill
        history.append(targets)
    for pool in (0, 1):
        counts = [at[pool] for at in history[150:]]
        assert _num_turns(counts) <= 2, counts
        assert max(counts) - min(counts) <= 1 + max(counts) // 8, counts


def _poisson(draw: random.Random, mean: float) -> int:
    return max(0, round(draw.gauss(mean, mean**0.5)))


def _of_rate(at_s: float, rate: Rate, targets: tuple[int, int]) -> Observation:
    """Requests of 1,000 prompt and 200 output tokens come at a rate."""
    tokens = rate.times(1000.0)
    answers = Answers(rate, 200.0, GAPS, max_seqs=128)
    return Observation(
        at_s,
        PoolSeen(targets[0], START_S, answers=answers),
        PoolSeen(targets[1], START_S, prompts=Prompts(tokens, token_s=2e-4)),
    )


def _num_turns(counts: list[int]) -> int:
    steps = [b - a for a, b in pairwise(counts) if a != b]
    return sum((a > 0) != (b > 0) for a, b in pairwise(steps))


@settings(max_examples=10, deadline=None)
@given(loads, st.sampled_from([0.0, 20.0, 120.0]))
def test_both_pools_recede_to_their_minimum_when_nothing_comes(load, start_s):
    requests, queued, running, waiting = load
    service = Service(start_s=start_s)
    service.run(60, requests=requests, queued_tokens=queued, num_running=running, num_waiting=waiting)
    service.run(2 * hold(SETTINGS, start_s) + 60)
    assert service.targets == (1, 1)


def test_a_burst_of_queued_prompts_adds_prefill_replicas_at_once_and_no_decode():
    service = Service()
    service.run(300, requests=2)
    before = service.targets
    service.step(requests=2, queued_tokens=400_000)
    assert service.targets[1] > before[1] and service.targets[0] == before[0]


def test_longer_answers_add_decode_replicas_and_no_prefill():
    service = Service()
    service.run(300, requests=10)
    before = service.targets
    service.run(10, requests=10, output_tokens=2000, num_running=400)
    assert service.targets[0] > before[0] and service.targets[1] == before[1]


def test_seats_of_prompts_that_wait_for_prefill_add_no_decode_replica():
    answers = Answers(
        steady(1.0), 2000.0, GAPS, num_running=8, num_waiting=80, num_for_prefill=80, max_seqs=128, num_reserved=80
    )
    pool = PoolSeen(1, START_S, answers=answers)

    def decide_with(queued: float, seatless: float) -> tuple[int, int]:
        prompts = Prompts(steady(500.0), queued_tokens=queued, seatless_tokens=seatless, token_s=2e-3)
        now = Observation(0.0, pool, PoolSeen(1, START_S, prompts))
        decided, _ = plan(now, bounds_of((1, 1), 50), SETTINGS, Memory())
        return decided.decode, decided.prefill

    decode, prefill = decide_with(queued=120_000, seatless=40_000)
    assert decode == 1 and prefill > 1, "prefill has 160 s of work"
    decode, prefill = decide_with(queued=40_000, seatless=40_000)
    assert decode > 1 and prefill < 4, "prefill has nothing to do, for they have no seats"


def test_a_queue_that_is_gone_before_a_replica_has_started_adds_none():
    seen_pool = PoolSeen(num_ready=4, start_s=120.0)
    waiting = Prompts(steady(1000), queued_tokens=100_000, token_s=2e-4)
    assert need_of_prompts(waiting, seen_pool, 0, SETTINGS).burst == 0
    quick = PoolSeen(num_ready=4, start_s=1.0)
    assert need_of_prompts(waiting, quick, 0, SETTINGS).burst > 4


def test_a_budget_too_small_gives_both_pools_the_same_part_of_what_they_need():
    own = SETTINGS.model_copy(update={"max_cost": 12.0})
    whole = decide((60.0, 0.0, 600, 0))
    part = decide((60.0, 0.0, 600, 0), own)
    assert whole.prefill + whole.decode > 12 == part.prefill + part.decode
    assert part.prefill / whole.prefill == pytest.approx(part.decode / whole.decode, rel=0.35)
    assert "budget" in part.reason


def test_what_somebody_else_has_set_is_held_and_then_reduced():
    service = Service()
    service.run(60, requests=1)
    service.targets, service.ready = (7, 5), [7, 5]
    service.run(hold(SETTINGS, START_S) - 4, requests=1)
    assert service.targets == (7, 5)
    service.run(20, requests=1)
    assert service.targets == (1, 1)


def test_a_replica_that_is_soon_needed_again_is_kept_for_longer_the_next_time():
    def seconds_until_removed():
        service.run(20, requests=60)
        begun_s = service.now_s
        while service.targets != (1, 1):
            service.step(requests=1)
        return service.now_s - begun_s

    service = Service()
    first_s = seconds_until_removed()
    assert seconds_until_removed() > 1.5 * first_s


def test_a_bound_that_is_not_kept_by_engines_enough_adds_one():
    service = Service()
    service.run(120, requests=20)
    before = service.targets
    service.run(10, requests=20, tail=Tail(count=5000, over=0.2))
    assert service.targets[0] == before[0] + 1
    service.run(120, requests=20)
    assert service.targets[0] <= before[0] + 1


def test_few_slow_ones_are_chance_and_change_nothing():
    service = Service()
    service.run(120, requests=20)
    before = service.targets
    service.run(60, requests=20, tail=Tail(count=50, over=0.2))
    service.run(60, requests=20, tail=Tail(count=5000, over=0.051))
    assert service.targets == before


def test_a_reason_names_both_pools_and_what_they_need():
    decided = decide((30.0, 50_000, 100, 0))
    assert decided.reason.startswith("prefill 1 to ") and ". decode 1 to " in decided.reason
    assert "engines' worth of prompts come" in decided.reason and "requests/s" in decided.reason


def test_without_a_prefill_pool_decode_has_engines_for_prompts_as_well():
    prompts = Prompts(steady(0.0), token_s=2e-4)
    busy = Prompts(Rate(20_000, 20_000, 20_000 * 1000), token_s=2e-4)
    answers = Answers(steady(20), 200.0, GAPS, max_seqs=128)
    alone = need_of_answers(answers, PoolSeen(1, START_S, prompts), 0, SETTINGS)
    both = need_of_answers(answers, PoolSeen(1, START_S, busy), 0, SETTINGS)
    assert both.lasting > alone.lasting + 4


def test_before_anything_was_measured_the_plan_is_one_engine_each():
    answers = Answers(steady(3.0), 0.0, None, num_waiting=3)
    now = Observation(0.0, PoolSeen(1, 60.0, answers=answers), PoolSeen(1, 60.0, Prompts(queued_tokens=100)))
    decided, _ = plan(now, (Bounds(1, 9, 1), Bounds(1, 9, 1)), SETTINGS, Memory())
    assert (decided.decode, decided.prefill) == (1, 1)


def test_sequences_that_pile_up_in_batches_too_large_get_seats_at_once():
    answers = Answers(steady(3.0), 50.0, GAPS, num_running=600, max_seqs=256)
    need = need_of_answers(answers, PoolSeen(2, START_S, answers=answers), 0, SETTINGS)
    assert need.burst > 4 > need.lasting


def test_a_reason_says_how_much_of_decodes_need_is_for_prompts():
    observation = seen(requests=10.0)
    answers, prefill = observation.decode.answers, observation.prefill
    assert answers is not None and prefill is not None
    assert "compute prompts" not in need_of_answers(answers, observation.decode, 0, SETTINGS).why
    colocated = replace(observation.decode, prompts=prefill.prompts)
    own = need_of_prompts(colocated.prompts, colocated, 0, SETTINGS).lasting
    need = need_of_answers(answers, colocated, 0, SETTINGS)
    assert need.why.endswith(f"need {need.lasting:.2f}, of which {own:.2f} compute prompts")
