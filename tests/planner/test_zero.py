"""Pools that may have no replica: what is held wakes them, and they sleep once nothing has come for a while."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.stats import EngineStats
from deployments.load.held import Held
from deployments.load.reading import DECODE, Reading
from deployments.planner.flow import Rate
from deployments.planner.need import need_of_answers, need_of_prompts
from deployments.planner.observation import Answers, GapCurve, Observation, PoolSeen, Prompts
from deployments.planner.observer import Observer
from deployments.planner.plan import plan
from deployments.planner.settings import PlannerSettings
from deployments.planner.state import Bounds, Memory
from deployments.planner.windows import HandedOn

SETTINGS = PlannerSettings(enabled=True, ttft_s=2.0, itl_s=0.05, hold_s=20.0, start_s=5.0)
SEATS = 64
# An engine's prompts of a second, and what it draws for them.
TOKENS_PER_S, OUTPUT_TOKENS, STEP_S = 5000, 100, 0.02


class Service:
    """Colocated, as a planner sees it each second: replicas start in a while, requests are held until one is there."""

    def __init__(self, most: int = 20, start_s: int = 5) -> None:
        self.observer = Observer(SETTINGS, is_colocated=True)
        self.memory, self.target, self.most, self.start_s = Memory(), 1, most, start_s
        self.engines: dict[str, EngineStats] = {}
        self.coming: list[float] = []
        self.now_s, self.num_started = 0.0, 0
        self.held: list[int] = []
        self.targets: list[int] = []
        self.reason = ""
        self._start()

    def _start(self) -> None:
        self.num_started += 1
        self.engines[f"d{self.num_started}"] = EngineStats(
            max_num_seqs=SEATS, max_num_batched_tokens=1000, num_blocks=1000, block_size=16
        )

    def step(self, prompts: tuple[int, ...] = (), num_running: int = 0) -> int:
        """A second: these prompts come, are computed and answered in it; or are held."""
        self.now_s += 1.0
        for at_s in [at_s for at_s in self.coming if at_s <= self.now_s]:
            self.coming.remove(at_s)
            self._start()
        self.held += prompts
        for engine in self.engines.values():
            engine.num_running = num_running
        if self.engines:
            self._serve(next(iter(self.engines.values())))
        self.observer.note_held(Held(len(self.held), sum(self.held), 1.0 if self.held else 0.0))
        engines = {name: engine.copy() for name, engine in self.engines.items()}
        seen = self.observer.observe(Reading({DECODE: engines}, self.now_s), self.now_s)
        decided, self.memory = plan(seen, (Bounds(0, self.most, self.target), None), SETTINGS, self.memory)
        self.reason = decided.reason
        self._follow(decided.decode)
        return self.target

    def _serve(self, engine: EngineStats) -> None:
        for num_tokens in self.held:
            steps = -(-num_tokens // engine.max_num_batched_tokens)
            engine.prompt_tokens += num_tokens
            engine.prefill_s += num_tokens / TOKENS_PER_S
            engine.prefill_steps += steps
            engine.generated_tokens += OUTPUT_TOKENS
            engine.itl_s.observe(STEP_S, OUTPUT_TOKENS)
            engine.steps += OUTPUT_TOKENS
            engine.finished += 1
        self.held.clear()

    def _follow(self, count: int) -> None:
        assert not (self.target > 1 and count == 0), "Serve goes to none by way of one"
        self.observer.note_asked(DECODE, count - self.target, self.now_s)
        self.coming += [self.now_s + self.start_s] * max(0, count - self.target)
        for _ in range(len(self.engines) + len(self.coming) - count):
            if self.coming:
                self.coming.pop()
            else:
                self.engines.popitem()
        self.target = count
        self.targets.append(count)

    def run(self, seconds: int, prompts: tuple[int, ...] = (), num_running: int = 0) -> None:
        for _ in range(seconds):
            self.step(prompts, num_running)


def asleep(**options: int) -> Service:
    """A service that has served, and has no replica any more."""
    service = Service(**options)
    service.run(40, prompts=(500, 500))
    service.run(200)
    assert service.target == 0 and not service.engines
    return service


def test_a_pool_sleeps_once_nothing_came_for_as_long_as_a_replica_is_held_and_no_sooner() -> None:
    service = Service()
    service.run(40, prompts=(500, 500))
    service.run(19)
    assert service.target >= 1
    service.run(200)
    assert service.target == 0 and service.targets[-150:] == [0] * 150


def test_one_short_request_between_two_readings_keeps_it_awake() -> None:
    service = Service()
    for _ in range(20):
        service.step(prompts=(10,))
        service.run(15)
    assert 0 not in service.targets


def test_what_runs_keeps_it_awake_however_long() -> None:
    service = Service()
    service.run(5, prompts=(500,))
    service.run(300, num_running=1)
    assert 0 not in service.targets


def test_one_held_request_wakes_one_replica_in_the_same_decision() -> None:
    service = asleep()
    assert service.step(prompts=(10,)) == 1
    service.run(4)
    assert service.target == 1 and service.held == [10]
    service.run(2)
    assert service.held == []


def test_before_anything_was_measured_it_wakes_one() -> None:
    service = Service()
    service.run(30)
    assert service.target == 0
    assert service.reason.endswith("decode 0: nobody is there, and nobody comes")
    assert service.step(prompts=(10,) * 5) == 1
    assert service.reason.startswith("decode 0 to 1: 5 requests are held until an engine is there; ")


def test_many_held_requests_wake_as_many_as_they_need_at_once() -> None:
    service = asleep()
    woken = service.step(prompts=(10,) * (3 * SEATS))
    assert woken >= 3
    service.run(3)
    assert service.target == woken, "and it does not waver while they start"


def test_long_prompts_that_are_held_wake_more_than_their_seats_need() -> None:
    service = asleep()
    # 20 prompts, of 40 s of one engine, while one starts in 5 s.
    assert service.step(prompts=(10_000,) * 20) >= 3


def test_a_replica_that_is_starting_is_awaited_though_who_woke_it_has_left_and_goes_after_a_hold() -> None:
    service = asleep(start_s=100)
    service.step(prompts=(10,))
    service.held.clear()
    service.run(99)
    assert service.target == 1 and not service.engines, "it takes longer than a hold"
    service.run(10)
    assert service.target == 1 and service.engines
    service.run(300)
    assert service.target == 0


def test_traffic_that_comes_just_after_it_slept_is_awaited_for_longer_the_next_time() -> None:
    service = asleep()

    def seconds_awake() -> int:
        service.step(prompts=(10,))
        begun = len(service.targets)
        while service.step() > 0:
            pass
        return len(service.targets) - begun

    first = seconds_awake()
    assert seconds_awake() > 1.5 * first


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 100)), min_size=1, max_size=12))
def test_whatever_comes_nobody_is_held_for_longer_than_a_start_and_it_sleeps_in_the_end(
    bursts: list[tuple[int, int]],
) -> None:
    service = Service()
    for num_requests, pause_s in bursts:
        service.step(prompts=(100,) * num_requests)
        for _ in range(pause_s):
            held_before = len(service.held)
            service.step()
            assert service.target > 0 or not service.held
            assert not held_before or service.coming or not service.held
    service.run(16 * 60)
    assert service.target == 0


def test_nothing_is_removed_to_none_while_a_decode_replica_computes_prompts_for_others() -> None:
    idle = Answers(gaps=GapCurve(0.006, 0.0003), output_tokens=100.0, max_seqs=SEATS)
    now = Observation(1000.0, PoolSeen(1, 5.0, answers=idle), PoolSeen(1, 5.0), num_flipped=1)
    bounds = Bounds(0, 4, 2), Bounds(0, 4, 0)
    flips = SETTINGS.model_copy(update={"flip": True})
    memory = Memory(num_flipped=1)
    for second in range(100):
        decided, memory = plan(replace(now, at_s=1000.0 + second), bounds, flips, memory)
        if decided.num_flipped == 0:
            break
        assert decided.decode > decided.num_flipped, "one that decodes is left beside it"
    assert decided.num_flipped == 0, "first it decodes again"


def test_a_budget_for_one_replica_gives_it_to_decode_however_much_prefill_needs() -> None:
    held = Answers(Rate(1.0, 1.0, 1.0), 100.0, GapCurve(0.006, 0.0003), num_waiting=1, num_held=1, max_seqs=SEATS)
    work = Prompts(Rate(20_000, 20_000, 2e7), queued_tokens=100_000, token_s=2e-4)
    now = Observation(1000.0, PoolSeen(0, 5.0, answers=held), PoolSeen(0, 5.0, work))
    tight = SETTINGS.model_copy(update={"max_cost": 1.0})
    decided, _ = plan(now, (Bounds(0, 9, 0), Bounds(0, 9, 0)), tight, Memory())
    assert (decided.decode, decided.prefill) == (1, 0)


def test_while_nobody_computes_what_waits_does_not_become_less() -> None:
    waiting = Prompts(Rate(), queued_tokens=50_000, token_s=2e-4)
    some, none = PoolSeen(1, 60.0, waiting), PoolSeen(0, 60.0, waiting)
    assert need_of_prompts(waiting, some, 0, SETTINGS).burst == 0
    assert need_of_prompts(waiting, none, 0, SETTINGS).burst > 0
    answers = Answers(Rate(), 100.0, GapCurve(0.006, 0.0003), num_waiting=3 * SEATS, max_seqs=SEATS)
    assert need_of_answers(answers, PoolSeen(1, 60.0), 0, SETTINGS).num_engines <= 1
    assert need_of_answers(answers, PoolSeen(0, 60.0), 0, SETTINGS).num_engines == 3


@pytest.mark.parametrize("order", ["held first", "engine first"])
def test_what_was_held_and_goes_on_to_engines_has_come_once(order: str) -> None:
    handed_on = HandedOn(within_s=10.0)
    came = [handed_on.came(5, 0, 1.0)]
    if order == "held first":
        came += [handed_on.came(0, 0, 2.0), handed_on.came(0, 5, 3.0)]
    else:
        came += [handed_on.came(5, 5, 2.0), handed_on.came(0, 0, 3.0)]
    assert came == [5, 0, 0]
    assert handed_on.came(0, 2, 4.0) == 2


def test_one_that_left_while_it_was_held_hides_none_that_comes_later() -> None:
    handed_on = HandedOn(within_s=10.0)
    handed_on.came(1, 0, 0.0)
    handed_on.came(0, 0, 1.0)
    assert handed_on.came(0, 3, 20.0) == 3


def test_one_that_leaves_after_an_engine_told_of_others_hides_nothing_for_long() -> None:
    handed_on = HandedOn(within_s=10.0)
    assert [handed_on.came(3, 0, 0.0), handed_on.came(3, 2, 1.0), handed_on.came(0, 0, 2.0)] == [3, 0, 0]
    assert [handed_on.came(0, 1, 3.0), handed_on.came(0, 1, 4.0)] == [0, 1]
