"""What the planner learns from what engines say of themselves."""

from dataclasses import replace

import pytest

from deployments.engine.stats import EngineStats
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.planner.observer import Observer
from deployments.planner.settings import PlannerSettings

SETTINGS = PlannerSettings(ttft_s=1.0, itl_s=0.05, start_s=60.0)
TOKEN_S, STEP_S, SEQUENCE_S = 2e-4, 0.006, 0.0003


class Pools:
    """Engines that count as real ones do, each second what they were given in it."""

    def __init__(self, num_prefill=1, num_decode=1) -> None:
        self.observer = Observer(SETTINGS, is_colocated=False)
        self.engines: dict[str, dict[str, EngineStats]] = {PREFILL: {}, DECODE: {}}
        self.begun_s: dict[str, float] = {}
        self.now_s = 0.0
        for pool, count in ((PREFILL, num_prefill), (DECODE, num_decode)):
            for i in range(count):
                self.add(pool, f"{pool}{i}")
        self.seen = self.read()

    def add(self, pool: str, name: str) -> None:
        self.begun_s[name] = self.now_s
        self.engines[pool][name] = EngineStats(
            max_num_batched_tokens=1000, max_num_seqs=64, num_blocks=100, block_size=16, steps=1000
        )

    def prompts(self, name="prefill0", computed=1000, found=0, seconds=None) -> None:
        engine = self.engines[PREFILL][name]
        seconds = computed * TOKEN_S if seconds is None else seconds
        engine.prompt_tokens += computed
        engine.prefix_hit_tokens += found
        engine.prefill_steps += 1
        engine.steps += 1
        engine.prefill_s += seconds
        engine.ttft_s.observe(seconds)

    def answers(self, batch: int, steps=50, finished=0, name="decode0", gap_s=None) -> None:
        engine = self.engines[DECODE][name]
        engine.itl_s.observe(STEP_S + SEQUENCE_S * batch if gap_s is None else gap_s, batch * steps)
        engine.steps += steps
        engine.generated_tokens += batch * steps
        engine.finished += finished
        engine.num_running = batch

    def read(self, seconds=1.0, num_refused=0):
        self.now_s += seconds
        for name, engine in [*self.engines[PREFILL].items(), *self.engines[DECODE].items()]:
            engine.uptime_s = self.now_s - self.begun_s[name]
        copies = {pool: {n: e.copy() for n, e in engines.items()} for pool, engines in self.engines.items()}
        self.seen = self.observer.observe(Reading(copies, self.now_s), self.now_s, num_refused)
        return self.seen


def test_costs_of_prompts_and_of_batches_are_those_of_the_steps_that_ran():
    pools = Pools()
    for second in range(60):
        pools.prompts(computed=800 + 10 * (second % 20))
        pools.answers(batch=4 + second % 30)
        pools.read()
    assert pools.seen.prefill.prompts.token_s == pytest.approx(TOKEN_S, rel=0.02)
    gaps = pools.seen.decode.answers.gaps
    assert (gaps.step_s, gaps.sequence_s) == (pytest.approx(STEP_S, rel=0.05), pytest.approx(SEQUENCE_S, rel=0.05))


def test_what_comes_is_what_was_computed_found_and_waits():
    pools = Pools()
    for _ in range(300):
        pools.prompts(computed=600, found=200)
        pools.engines[DECODE]["decode0"].num_queued_prompt_tokens += 200
        pools.engines[DECODE]["decode0"].num_remote_prompt_tokens += 200
        pools.read()
    prompts = pools.seen.prefill.prompts
    assert prompts.tokens.slow == pytest.approx(1000)
    assert prompts.uncached_share == pytest.approx(0.75)
    assert prompts.queued_tokens == 60_000
    assert pools.seen.decode.prompts.queued_tokens == 0


def test_the_first_of_a_queue_waits_since_as_much_had_come_as_has_left():
    pools = Pools()
    engine = pools.engines[PREFILL]["prefill0"]
    engine.num_queued_prompt_tokens = 5000
    pools.read()
    arrived_s = pools.now_s
    for _ in range(4):
        pools.prompts(computed=1000)
        engine.num_queued_prompt_tokens -= 1000
        pools.read()
    assert pools.seen.prefill.prompts.oldest_s == pools.now_s - arrived_s
    pools.prompts(computed=1000)
    engine.num_queued_prompt_tokens -= 1000
    assert pools.read().prefill.prompts.oldest_s == 0


def test_requests_that_were_refused_are_asked_for_as_well():
    pools = Pools()
    for _ in range(200):
        pools.prompts(computed=1000)
        pools.answers(batch=1, finished=1)
        pools.read(num_refused=1)
    assert pools.seen.decode.answers.requests.slow == pytest.approx(2.0, rel=0.02)
    assert pools.seen.prefill.prompts.tokens.slow == pytest.approx(2000, rel=0.02)


def test_a_cold_replica_teaches_neither_costs_nor_tails():
    pools = Pools()
    for _ in range(60):
        pools.prompts()
        pools.answers(batch=8)
        pools.read()
    before = pools.seen
    pools.add(PREFILL, "new")
    pools.add(DECODE, "cold")
    for _ in range(9):
        pools.prompts("new", seconds=3.0)
        pools.answers(batch=8, name="cold", gap_s=0.9)
        pools.prompts()
        pools.answers(batch=8)
        pools.read()
    assert pools.seen.prefill.prompts.token_s == pytest.approx(before.prefill.prompts.token_s, rel=1e-6)
    assert pools.seen.decode.answers.gaps.seconds(8) == pytest.approx(before.decode.answers.gaps.seconds(8), rel=1e-6)
    assert (pools.seen.prefill.tail.over, pools.seen.decode.tail.over) == (0, 0)
    assert (pools.seen.prefill.num_ready, pools.seen.decode.num_ready) == (2, 2)


def test_an_engine_whose_steps_take_seconds_tells_costs_after_the_first_few():
    pools = Pools()
    pools.add(PREFILL, "new")
    pools.engines[PREFILL]["new"].steps = 0
    del pools.engines[PREFILL]["prefill0"]
    for _ in range(12):
        pools.read()
    assert pools.seen.prefill is not None
    assert not pools.seen.prefill.prompts.token_s
    for _ in range(6):
        pools.prompts("new", computed=8000)
        pools.read()
    assert pools.seen.prefill.prompts.token_s == pytest.approx(TOKEN_S, rel=0.05)


def test_a_warm_replica_that_is_slow_shows_in_the_tail():
    pools = Pools()
    for _ in range(60):
        pools.answers(batch=10, gap_s=0.03)
        pools.answers(batch=10, gap_s=0.2, steps=25)
        pools.read()
    assert pools.seen.decode.tail.over == pytest.approx(1 / 3)


def test_how_long_a_replica_takes_to_start_is_seen():
    pools = Pools()
    assert pools.seen.prefill.start_s == 60.0
    for after_s, name in ((25, "a"), (35, "b")):
        pools.observer.note_asked(PREFILL, 1, pools.now_s)
        pools.read(after_s)
        pools.add(PREFILL, name)
        pools.read(1)
    assert pools.seen.prefill.start_s == 36.0
    assert pools.seen.decode.start_s == 60.0


def test_a_replica_that_was_asked_for_and_is_not_wanted_any_more_is_not_waited_for():
    pools = Pools()
    pools.observer.note_asked(PREFILL, 1, pools.now_s)
    pools.observer.note_asked(PREFILL, -1, pools.now_s)
    pools.read(500)
    pools.observer.note_asked(PREFILL, 1, pools.now_s)
    pools.read(7)
    pools.add(PREFILL, "a")
    assert pools.read(1).prefill.start_s == 8.0


def test_a_replica_that_goes_or_starts_anew_takes_nothing_back():
    pools = Pools(num_decode=2)
    for _ in range(100):
        pools.answers(batch=4, finished=2)
        pools.answers(batch=4, finished=2, name="decode1")
        pools.read()
    pools.engines[DECODE]["decode0"] = replace(EngineStats(), max_num_seqs=64)
    del pools.engines[DECODE]["decode1"]
    rate = pools.seen.decode.answers.requests.slow
    assert 0 < pools.read().decode.answers.requests.slow <= rate


def test_a_replica_that_is_told_of_late_and_is_older_than_the_planner_brings_no_past():
    pools = Pools()
    for _ in range(3):
        pools.read()
    for name, pool in (("old_prefill", PREFILL), ("old_decode", DECODE)):
        pools.add(pool, name)
        pools.begun_s[name] = -100_000.0
    pools.observer.note_asked(PREFILL, 1, pools.now_s)
    pools.prompts("old_prefill", computed=30_000_000, seconds=6_000.0)
    pools.answers(batch=8, steps=500_000, finished=30_000, name="old_decode")
    pools.read()
    for _ in range(60):
        pools.prompts("old_prefill", computed=500)
        pools.answers(batch=8, finished=1, name="old_decode")
        pools.read()
    assert pools.seen.decode.answers.requests.slow == pytest.approx(1.0, rel=0.3)
    assert pools.seen.decode.answers.requests.variance < 2.0
    assert pools.seen.prefill.prompts.tokens.slow == pytest.approx(500, rel=0.1)
    assert pools.seen.prefill.start_s == SETTINGS.start_s, "the one that was asked for has not come"


@pytest.mark.parametrize("age_s", [0.5, 9.0], ids=["fresh", "told again after a crash"])
def test_what_came_between_an_old_first_reading_and_the_planner_is_past(age_s):
    observer, rates = Observer(SETTINGS, True), []

    def told(at_s: float) -> Reading:
        done = round(0.7 * at_s)
        stats = replace(EngineStats(), finished=done, steps=30 * done, uptime_s=at_s, max_num_seqs=64, num_blocks=100)
        return Reading({DECODE: {"decode0": stats}}, at_s)

    for at_s in range(100, 160, 2):
        answers = observer.observe(told(at_s - (age_s if at_s == 100 else 0.5)), float(at_s)).decode.answers
        assert answers is not None
        rates.append(answers.requests.fast)
    assert max(rates) < 1.1 and rates[-1] == pytest.approx(0.7, rel=0.3)


def test_a_replica_that_is_not_heard_of_for_a_while_brings_nothing_twice():
    pools = Pools(num_decode=0)
    pools.add(DECODE, "decode0")
    for _ in range(300):
        pools.answers(batch=8, finished=1)
        pools.read()
    away = pools.engines[DECODE].pop("decode0")
    pools.read()
    pools.engines[DECODE]["decode0"] = away
    pools.answers(batch=8, finished=1)
    assert pools.read().decode.answers.requests.slow == pytest.approx(1.0, rel=0.05)


def test_the_first_requests_of_a_newborn_replica_have_come():
    pools = Pools(num_decode=0)
    pools.read(10)
    pools.add(DECODE, "decode0")
    pools.answers(batch=8, finished=20)
    assert pools.read().decode.answers.num_new >= 20


def test_a_replica_that_changes_its_role_has_not_started_and_what_it_did_before_has_not_come():
    pools = Pools(num_decode=2)
    pools.observer.note_asked(PREFILL, 1, pools.now_s)
    for _ in range(60):
        pools.prompts(computed=800)
        for name in ("decode0", "decode1"):
            engine = pools.engines[DECODE][name]
            engine.prompt_tokens += 1000
            engine.prefill_steps += 1
            engine.prefill_s += 1000 * 10 * TOKEN_S
        pools.read()
    pools.engines[PREFILL]["decode1"] = pools.engines[DECODE].pop("decode1")
    pools.prompts(computed=800)
    seen = pools.read()
    assert seen.prefill.num_ready == 2 and seen.decode.num_ready == 1
    assert seen.prefill.start_s == SETTINGS.start_s, "the one that was asked for has not come"
    assert seen.prefill.prompts.tokens.slow == pytest.approx(800)
    assert seen.prefill.prompts.token_s == pytest.approx(TOKEN_S, rel=0.02)


def test_prompts_that_decode_computes_since_there_is_no_prefill_replica_are_prefills_to_tell():
    pools = Pools(num_prefill=0)
    for _ in range(300):
        engine = pools.engines[DECODE]["decode0"]
        engine.prompt_tokens += 600
        engine.prefix_hit_tokens += 200
        engine.prefill_steps += 1
        engine.prefill_s += 600 * TOKEN_S
        engine.num_queued_prompt_tokens = 500
        seen = pools.read()
    assert seen.prefill.num_ready == 0
    assert seen.prefill.prompts.tokens.slow == pytest.approx(800, rel=0.01)
    assert seen.prefill.prompts.uncached_share == pytest.approx(0.75)
    assert seen.prefill.prompts.token_s == pytest.approx(TOKEN_S, rel=0.02)
    assert seen.prefill.prompts.queued_tokens == 500
    assert seen.decode.prompts.work.slow == 0


def test_a_replica_that_is_the_first_of_its_pool_was_seen_to_start():
    pools = Pools(num_prefill=0)
    pools.observer.note_asked(PREFILL, 1, pools.now_s)
    for _ in range(7):
        pools.read()
    pools.add(PREFILL, "prefill0")
    assert pools.read().prefill.start_s == 8.0


def test_prompts_that_decode_takes_over_while_a_prefill_replica_starts_are_prefills_to_tell():
    pools = Pools()

    def run(seconds: int, here: int, there: int):
        for _ in range(seconds):
            engine = pools.engines[DECODE]["decode0"]
            engine.prompt_tokens += here
            engine.prefill_steps += 1
            engine.prefill_s += here * TOKEN_S
            pools.prompts(computed=there)
            seen = pools.read()
        return seen

    run(300, here=100, there=900)
    pools.observer.note_asked(PREFILL, 1, pools.now_s)
    seen = run(50, here=800, there=1200)
    assert seen.decode.prompts.tokens.fast == pytest.approx(200, rel=0.05), "its usual tenth"
    assert seen.prefill.prompts.tokens.fast == pytest.approx(1800, rel=0.05)
    seen = run(200, here=800, there=1200)
    assert seen.decode.prompts.tokens.fast == pytest.approx(800, rel=0.05), "that replica does not come"


def test_prompts_without_a_seat_wait_for_decode_first():
    pools = Pools()
    decode = pools.engines[DECODE]["decode0"]
    decode.num_waiting, decode.num_queued_prompt_tokens, decode.num_remote_prompt_tokens = 4, 1000, 500
    pools.engines[PREFILL]["prefill0"].num_queued_prompt_tokens = 300
    seen = pools.read()
    assert (seen.prefill.prompts.queued_tokens, seen.prefill.prompts.seatless_tokens) == (800, 500)
    assert (seen.decode.answers.num_waiting, seen.decode.answers.num_for_prefill) == (4, 2)
