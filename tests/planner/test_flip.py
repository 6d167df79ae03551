"""Decode replicas compute prompts where prefill lacks replicas, and go back: how many, which, and when."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.stats import EngineStats
from deployments.planner.flip import Lack, Side, choose_flipped, num_flipped
from deployments.planner.flow import Rate
from deployments.planner.observation import Answers, GapCurve, Observation, PoolSeen, Prompts
from deployments.planner.plan import plan
from deployments.planner.settings import PlannerSettings
from deployments.planner.state import Bounds, Lent, Memory

HOLD_S, START_S = 60.0, 30.0
SETTINGS = PlannerSettings(ttft_s=2.0, itl_s=0.05, hold_s=HOLD_S, start_s=START_S, flip=True)
SHORT, WAITS = Lack(0.0, START_S, may_come=False), Lack(1.0, START_S, may_come=True)
ONE, THREE = Bounds(1, 1, 1), Bounds(3, 3, 3)
# Requests per second of prompts of 1,000 tokens, 0.2 ms each, and of answers of 100 tokens: so many engines' worth.
ONE_PREFILL, TWO_PREFILL, THREE_PREFILL = 1.0, 5.0, 10.5
ONE_DECODE, TWO_DECODE = 2.0, 60.0

sides = st.builds(
    lambda ready, need, more: Side(ready, need, need + more), st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)
)
lacks = st.builds(Lack, st.floats(0, 100), st.just(START_S), st.booleans())


@given(st.integers(0, 5), sides, sides, st.integers(0, 5), lacks)
def test_one_replica_always_decodes_and_no_more_flip_than_help(now, prefill, decode, removable, lack):
    count = num_flipped(now, prefill, decode, removable, lack)
    assert 0 <= count <= max(0, now + decode.ready - 1)
    if count > now:
        assert count - now <= min(prefill.need - prefill.ready, decode.ready - decode.held)
        assert lack.is_lasting or count - now <= removable
    if decode.need > decode.ready:
        assert count <= now


def test_what_would_be_removed_flips_at_once_and_what_would_not_where_prefill_gets_no_other():
    prefill, idle = Side(1, 3, 3), Side(3, 1, 1)
    assert num_flipped(0, prefill, idle, 1, WAITS) == 1
    assert num_flipped(0, prefill, idle, 0, WAITS) == 0
    assert num_flipped(0, prefill, idle, 0, replace(WAITS, seconds=START_S + 1)) == 2
    assert num_flipped(0, prefill, idle, 0, SHORT) == 2


def test_they_go_back_for_decode_at_once_and_for_prefill_once_it_has_needed_fewer_for_long_enough():
    assert num_flipped(2, Side(3, 3, 3), Side(1, 2, 2), 0, SHORT) == 1
    assert num_flipped(2, Side(3, 1, 3), Side(1, 1, 1), 0, SHORT) == 2
    assert num_flipped(2, Side(3, 1, 2), Side(1, 1, 1), 0, SHORT) == 1


def engines(**busy: int) -> dict[str, EngineStats]:
    return {name: EngineStats(num_running=count, num_queued_prompt_tokens=count) for name, count in busy.items()}


def test_those_with_the_least_to_do_change():
    pool = engines(a=5, b=0, c=2, d=1)
    assert choose_flipped(frozenset(), pool, 2) == {"b", "d"}
    assert choose_flipped(frozenset("a"), pool, 2) == {"a", "b"}
    assert choose_flipped(frozenset("ad"), pool, 1) == {"a"}
    assert choose_flipped(frozenset("ax"), pool, 1) == {"a"}, "x is gone"
    assert choose_flipped(frozenset("x"), engines(), 1) == frozenset()


class Cluster:
    """Two deployments that follow the planner; nodes there are as many as told."""

    def __init__(self, prefill=ONE, decode=THREE, nodes=99, own=SETTINGS) -> None:
        self.bounds, self.own = [decode, prefill], own
        self.ready = [decode.target, prefill.target]
        self.nodes, self.flipped, self.memory = nodes, 0, Memory()
        self.now_s, self.reason = 0.0, ""
        self.starting: list[tuple[float, int]] = []

    def observe(self, prompts: float, answers: float) -> Observation:
        tokens, come = (Rate(rate, rate, rate * size) for rate, size in ((prompts * 1000, 1000), (answers, 1)))
        generated = Answers(come, 100.0, GapCurve(0.006, 0.0003), max_seqs=8, num_running=1, kv_use=0.01)
        return Observation(
            self.now_s,
            PoolSeen(self.ready[0] - self.flipped, START_S, answers=generated),
            PoolSeen(self.ready[1] + self.flipped, START_S, Prompts(tokens, 1.0, token_s=2e-4)),
            self.flipped,
        )

    def step(self, prompts: float, answers: float) -> None:
        self.now_s += 1.0
        for due in [due for due in self.starting if due[0] <= self.now_s and sum(self.ready) < self.nodes]:
            self.ready[due[1]] += self.ready[due[1]] < self.bounds[due[1]].target
            self.starting.remove(due)
        seen = self.observe(prompts, answers)
        decided, self.memory = plan(seen, (self.bounds[0], self.bounds[1]), self.own, self.memory)
        for pool, count in enumerate((decided.decode, decided.prefill)):
            bounds = self.bounds[pool]
            assert bounds.least <= count <= bounds.most
            self.starting += [(self.now_s + START_S, pool)] * max(0, count - bounds.target)
            self.bounds[pool] = replace(bounds, target=count)
            self.ready[pool] = min(self.ready[pool], count)
        if decided.num_flipped != self.flipped:
            self.reason = decided.reason
        self.flipped = decided.num_flipped
        assert 0 <= self.flipped < max(1, self.ready[0])

    def run(self, seconds: int, prompts: float, answers: float = ONE_DECODE) -> None:
        for _ in range(seconds):
            self.step(prompts, answers)

    @property
    def targets(self) -> tuple[int, int]:
        """Of decode, of prefill."""
        return self.bounds[0].target, self.bounds[1].target


def test_the_loads_need_what_they_are_called_by():
    cluster = Cluster(Bounds(1, 9, 1), Bounds(1, 9, 1), own=SETTINGS.model_copy(update={"flip": False}))
    for prompts, prefill in ((ONE_PREFILL, 1), (TWO_PREFILL, 2), (THREE_PREFILL, 3)):
        cluster.run(1, prompts)
        assert cluster.targets == (1, prefill)
    cluster.run(1, THREE_PREFILL, TWO_DECODE)
    assert cluster.targets == (2, 3)


def test_with_pools_of_fixed_size_idle_decode_replicas_flip_and_go_back_for_decode():
    cluster = Cluster()
    cluster.run(120, ONE_PREFILL)
    assert cluster.flipped == 0, "there is nothing to help with"
    cluster.run(2, TWO_PREFILL)
    assert cluster.flipped == 1 and "0 to 1 of decode compute prompts: prefill needs 2" in cluster.reason
    cluster.run(2, THREE_PREFILL)
    assert cluster.flipped == 2
    cluster.run(1, THREE_PREFILL, TWO_DECODE)
    assert cluster.flipped == 1 and "2 to 1 of decode compute prompts: decode needs 2" in cluster.reason
    assert cluster.targets == (3, 1)


def test_they_go_back_once_prefill_has_needed_fewer_for_as_long_as_a_replica_is_held():
    cluster = Cluster()
    cluster.run(120, ONE_PREFILL)
    cluster.run(10, TWO_PREFILL)
    cluster.run(int(HOLD_S) - 5, ONE_PREFILL)
    assert cluster.flipped == 1
    cluster.run(10, ONE_PREFILL)
    assert cluster.flipped == 0 and "prefill needs 1 and has 2" in cluster.reason


def test_a_decode_replica_that_would_be_removed_flips_instead():
    cluster = Cluster(Bounds(1, 9, 1), Bounds(1, 9, 2))
    cluster.run(int(HOLD_S) - 5, ONE_PREFILL)
    assert cluster.targets == (2, 1), "what it has counts as needed at first"
    cluster.run(int(HOLD_S), TWO_PREFILL)
    assert cluster.flipped == 1 and cluster.targets == (2, 1)


def test_a_replica_that_goes_back_stays_where_the_decode_deployment_may_have_no_more():
    cluster = Cluster(decode=Bounds(1, 2, 2))
    cluster.run(int(HOLD_S) + 20, TWO_PREFILL)
    assert cluster.flipped == 1 and cluster.targets == (2, 1)
    for _ in range(20):
        cluster.run(1, TWO_PREFILL, TWO_DECODE)
        assert cluster.flipped == 0 and cluster.targets == (2, 1)


def test_where_nodes_are_short_decode_lends_of_its_minimum_and_where_they_are_not_it_does_not():
    short, plenty = Cluster(Bounds(1, 9, 1), nodes=4), Cluster(Bounds(1, 9, 1))
    for cluster in (short, plenty):
        cluster.run(120, ONE_PREFILL)
        cluster.run(int(START_S), TWO_PREFILL)
        assert cluster.flipped == 0, "one is on its way, as far as anybody knows"
        cluster.run(10, TWO_PREFILL)
    assert short.flipped == 1 and "has lacked some for 31 s" in short.reason
    assert short.targets == (3, 1), "it takes the place of the one that got no node"
    assert plenty.flipped == 0 and plenty.targets == (3, 2)


def test_where_prefill_may_have_no_more_decode_lends_within_seconds_of_its_own_last_need():
    cluster = Cluster(decode=Bounds(1, 2, 2))
    cluster.run(20, ONE_PREFILL, TWO_DECODE)
    cluster.run(8, TWO_PREFILL)
    assert cluster.flipped == 0
    cluster.run(4, TWO_PREFILL)
    assert cluster.flipped == 1 and cluster.targets == (2, 1)


def test_to_lend_what_is_held_is_no_reason_to_start_another():
    cluster = Cluster(decode=Bounds(1, 9, 2))
    cluster.run(20, ONE_PREFILL, TWO_DECODE)
    for _ in range(2 * int(HOLD_S)):
        cluster.step(TWO_PREFILL, ONE_DECODE)
        assert cluster.targets == (2, 1)
    assert cluster.flipped == 1


def test_the_oftener_a_replica_is_back_at_once_the_longer_it_is_not_lent():
    cluster, lent_s = Cluster(), list[float]()
    cluster.run(120, ONE_PREFILL)
    for _ in range(40):
        before = cluster.flipped
        cluster.run(15, THREE_PREFILL)
        if cluster.flipped > before:
            lent_s.append(cluster.now_s)
        cluster.run(4, THREE_PREFILL, 2 * TWO_DECODE)
    assert 1 <= len(lent_s) <= 2, f"lent after {lent_s} s"
    cluster.run(30, THREE_PREFILL)
    assert cluster.flipped == 2, "it has learned, but not for ever"


def test_what_is_lent_and_back_was_not_removed_and_teaches_no_patience():
    cluster = Cluster(decode=Bounds(1, 3, 3))
    for _ in range(5):
        cluster.run(30, THREE_PREFILL)
        cluster.run(5, ONE_PREFILL, 2 * TWO_DECODE)
    assert cluster.memory.decode.patience == cluster.memory.prefill.patience == 1.0
    cluster.run(2 * int(HOLD_S) + 10, ONE_PREFILL)
    assert cluster.targets == (1, 1)


def test_where_nodes_are_short_a_replica_that_comes_and_goes_teaches_prefill_no_patience_either():
    cluster = Cluster(Bounds(1, 9, 1), Bounds(2, 2, 2), nodes=3)
    cluster.run(120, ONE_PREFILL)
    lent = 0
    for _ in range(5):
        cluster.run(60, TWO_PREFILL)
        lent += cluster.flipped
        cluster.run(5, TWO_PREFILL, TWO_DECODE)
        assert cluster.memory.prefill.patience == 1.0
    assert lent > 0


def test_only_a_replica_that_decode_calls_back_soon_was_lent_too_soon_and_that_is_forgotten():
    lent = Lent().after(0, 1, 100.0, is_called_back=False)
    assert lent.after(1, 0, 105.0, is_called_back=False).hold_s == lent.hold_s == 10.0
    assert lent.after(1, 0, 131.0, is_called_back=True).hold_s == 10.0
    hasty = lent.after(2, 1, 120.0, is_called_back=True)
    assert hasty.hold_s == hasty.after(1, 0, 121.0, is_called_back=True).hold_s == 20.0, "one haste, if two come back"
    for at_s in range(122, 2000):
        hasty = hasty.noted(1, 3, float(at_s))
    assert hasty.hold_s == 10.0


def test_decode_that_got_a_replica_back_is_not_asked_again_at_once():
    cluster = Cluster()
    cluster.run(120, ONE_PREFILL)
    flips = 0
    for _ in range(20):
        before = cluster.flipped
        cluster.run(5, THREE_PREFILL)
        cluster.run(5, THREE_PREFILL, TWO_DECODE)
        flips += cluster.flipped != before
    assert flips <= 2


def test_without_the_setting_nothing_flips():
    cluster = Cluster(own=SETTINGS.model_copy(update={"flip": False}))
    cluster.run(200, THREE_PREFILL)
    assert cluster.flipped == 0


def test_a_flipped_replica_that_is_gone_is_made_up_for_by_another():
    cluster = Cluster()
    cluster.run(120, ONE_PREFILL)
    cluster.run(5, TWO_PREFILL)
    cluster.flipped, cluster.ready[0] = 0, 2
    cluster.run(1, TWO_PREFILL)
    assert cluster.flipped == 1 and cluster.targets == (3, 1)


@given(st.floats(0, 20), st.floats(0, 200), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6), st.floats(0.5, 4))
def test_flips_keep_the_budget(prompts, answers, num_decode, flipped, num_prefill, decode_cost):
    flipped = min(flipped, num_decode - 1)
    own = SETTINGS.model_copy(
        update={"max_cost": num_decode * decode_cost + num_prefill, "decode_cost": decode_cost, "hold_s": 1e-3}
    )
    cluster = Cluster(Bounds(1, 9, num_prefill), Bounds(1, 9, num_decode), own=own)
    cluster.flipped = flipped
    for _ in range(3):
        cluster.step(prompts, answers)
        decode, prefill = cluster.targets
        assert decode * decode_cost + prefill <= own.max_cost + 1e-6


@given(st.lists(st.tuples(st.integers(1, 25), st.floats(0, 20), st.floats(0, 200)), max_size=8), st.floats(0.5, 3))
def test_whatever_comes_flips_keep_the_budget(loads, decode_cost):
    own = SETTINGS.model_copy(update={"max_cost": 2 + 2 * decode_cost, "decode_cost": decode_cost, "hold_s": 20.0})
    cluster = Cluster(Bounds(1, 9, 1), Bounds(1, 9, 1), own=own)
    for seconds, prompts, answers in loads:
        for _ in range(seconds):
            cluster.step(prompts, answers)
            decode, prefill = cluster.targets
            assert decode * decode_cost + prefill <= own.max_cost + 1e-6


@pytest.mark.parametrize("lent", [0, 1, 2])
def test_a_plan_that_begins_anew_goes_on_with_the_roles_that_there_are(lent):
    cluster = Cluster()
    cluster.flipped = lent  # as after a restart of whoever plans: nothing is remembered
    cluster.run(1, 1 + 4 * lent)
    assert cluster.flipped == lent and cluster.targets == (3, 1)


def test_prefill_goes_to_none_where_decode_hardly_notices_the_prompts_and_comes_back_for_more():
    cluster = Cluster(Bounds(0, 4, 1), Bounds(1, 4, 1), own=SETTINGS.model_copy(update={"flip": False}))
    cluster.run(int(HOLD_S) + 5, 0.2)
    assert cluster.targets == (1, 0)
    cluster.run(300, 0.2)
    assert cluster.targets == (1, 0)
    cluster.run(1, ONE_PREFILL)
    assert cluster.targets == (1, 1)
    least_one = Cluster(Bounds(1, 4, 1), Bounds(1, 4, 1))
    least_one.run(300, 0.0)
    assert least_one.targets == (1, 1)


def test_what_waits_before_any_prompt_was_measured_starts_no_first_prefill_replica():
    cluster = Cluster(Bounds(0, 4, 0), ONE)
    seen = cluster.observe(ONE_PREFILL, ONE_DECODE)
    assert seen.prefill is not None
    unmeasured = replace(seen.prefill, prompts=Prompts(queued_tokens=5000.0))
    decided, _ = plan(replace(seen, prefill=unmeasured), (ONE, Bounds(0, 4, 0)), SETTINGS, Memory())
    assert decided.prefill == 0


def test_where_there_is_no_prefill_replica_and_none_comes_an_idle_decode_replica_is_the_first():
    cluster = Cluster(Bounds(0, 4, 0), Bounds(2, 2, 2), nodes=2)
    cluster.run(120, 0.2)
    assert cluster.flipped == 0 and cluster.targets == (2, 0)
    cluster.run(int(START_S), ONE_PREFILL)
    assert cluster.flipped == 0 and cluster.targets == (2, 1)
    cluster.run(3, ONE_PREFILL)
    assert cluster.flipped == 1 and cluster.targets == (2, 0)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 100)), max_size=12), st.integers(0, 2), st.integers(1, 3))
def test_whatever_comes_bounds_are_kept_and_one_replica_decodes(loads, least_prefill, least_decode):
    cluster = Cluster(
        Bounds(least_prefill, 3, least_prefill), Bounds(least_decode, 4, least_decode), nodes=5,
        own=SETTINGS.model_copy(update={"hold_s": 5.0, "start_s": 5.0}),
    )  # fmt: skip
    for prompts, answers in loads:
        cluster.run(7, prompts, answers)  # which looks at both
