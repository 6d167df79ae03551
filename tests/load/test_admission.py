"""Who is let in: estimates are those of the formula, and the bounds hold."""

import copy
from dataclasses import replace

import pytest

from deployments.errors import OverloadedError
from deployments.load.admission import Admission, Reason
from deployments.load.outlook import MAX_AGE_S, HoldingTime
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.load.step_cost import StepCost
from deployments.messages import Priority
from tests.load.pools import BOUNDS, IDLE, SURE, A, Pools, build, worked


def test_an_idle_service_takes_a_prompt_however_long_it_takes() -> None:
    pools = build()
    assert pools.outlook().wait.high == 0
    pools.admit(50_000)


def test_the_wait_is_what_is_queued_by_the_speed_of_all_engines() -> None:
    pools = build()
    pools.queue(600)
    outlook = pools.outlook()
    assert outlook.queued_tokens == 600
    assert outlook.speed == pytest.approx(100) and outlook.wait.best == pytest.approx(6)
    assert outlook.wait.low == pytest.approx(6, rel=0.02)
    pools.prefill["q"] = IDLE
    pools.queue(600)
    assert pools.outlook().wait.best == pytest.approx(3)


def test_a_prompt_that_would_be_late_is_refused_with_the_numbers() -> None:
    pools = build()
    pools.queue(600)
    pools.admit(100)  # 6 s, and 1 s of its own, and 1 s of those that overtake it: 8 of 8
    error = pools.refusal(100)
    assert error.retry_after_s == pytest.approx(1, rel=0.1)
    for part in (
        "may take 9.0 s",
        "8.9 s by the",
        "at most 8.0 s",
        "700 prompt tokens",
        "100 tokens/s",
        "normal priority",
    ):
        assert part in str(error)
    assert pools.admission.refusals == {(Reason.TTFT, Priority.NORMAL): 1}


def test_between_readings_the_queue_drains_and_fills_with_what_was_let_in() -> None:
    pools = build()
    pools.queue(600)
    pools.now_s += 2.0
    assert pools.outlook().queued_tokens == pytest.approx(400)
    ticket = pools.admit(150)
    assert pools.outlook().queued_tokens == pytest.approx(550)
    ticket.first_token(0)
    assert pools.outlook().queued_tokens == pytest.approx(400)
    pools.queue(300)
    assert pools.outlook().queued_tokens == 300, "the reading says all there is"


def test_what_is_not_in_the_reading_yet_counts_once_for_each_ingress() -> None:
    pools = build()
    pools.decode["d"] = replace(IDLE, num_receivers=3)
    pools.queue(0)
    pools.admit(150)
    assert pools.outlook().queued_tokens == 450
    pools.now_s -= 0.9  # the next reading begins right behind it
    pools.read()
    assert pools.outlook().queued_tokens == 450, "it may still be on its way"


def test_short_prompts_are_the_decode_pools() -> None:
    pools = build()
    pools.queue(100_000)
    pools.admit(99)
    pools.refusal(100)


def test_prompts_that_wait_in_the_decode_pool_for_the_other_one_are_queued_for_it() -> None:
    pools = build()
    waiting = replace(IDLE, num_queued_prompt_tokens=650, num_remote_prompt_tokens=500, num_waiting=5, num_running=8)
    pools.decode["d"] = waiting
    pools.read()
    assert pools.outlook().queued_tokens == 500
    assert pools.outlook(DECODE).queued_tokens == 150


def test_a_colocated_pool_computes_every_prompt() -> None:
    admission = Admission(replace(BOUNDS, min_remote_tokens=None), lambda: 0.0)
    admission.pools[DECODE].cost = copy.copy(SURE)
    admission.update(Reading({DECODE: {"d": replace(IDLE, num_queued_prompt_tokens=900)}}, 0.0))
    assert list(admission.pools) == [DECODE]
    with pytest.raises(OverloadedError):
        admission.admit([500], Priority.NORMAL, A)


def test_tokens_found_cached_count_as_computed_where_they_are_computed() -> None:
    admission = Admission(BOUNDS, lambda: 0.0)
    for engine in (IDLE, replace(worked(IDLE, 10.0), prefix_hit_tokens=9000)):
        admission.update(Reading({PREFILL: {"p": engine}, DECODE: {"d": engine}}, 0.0))
    assert admission.outlook(PREFILL).cost.seconds(1000, 10_000).best == pytest.approx(10)
    assert admission.outlook(DECODE).cost.seconds(1000, 1000).best == pytest.approx(10)


def test_a_cost_learned_from_one_tiny_prompt_refuses_nobody() -> None:
    pools = Pools(BOUNDS, cost=StepCost())
    pools.prefill["p"] = replace(IDLE, max_num_batched_tokens=512)
    pools.read()
    pools.prefill["p"] = replace(pools.prefill["p"], prompt_tokens=67, prefill_steps=1, prefill_s=1.0)
    pools.queue(964)
    outlook = pools.outlook()
    assert outlook.first_token(2402).best > 60, "for all that is known it may be late"
    assert outlook.first_token(2402).low < 8
    pools.admit(2402)


def test_once_the_cost_is_known_to_be_high_the_same_prompt_is_refused() -> None:
    pools = Pools(BOUNDS, cost=StepCost())
    pools.prefill["p"] = replace(IDLE, max_num_batched_tokens=512)
    pools.read()
    for step in range(1, 20):
        pools.prefill["p"] = replace(
            pools.prefill["p"], prompt_tokens=67 * step, prefill_steps=step, prefill_s=float(step)
        )
        pools.read()
    pools.queue(964)
    pools.admit(500)  # steps of 67 tokens say nothing of what 500 in one step cost
    for step in range(1, 20):
        pools.prefill["p"] = replace(
            pools.prefill["p"],
            prompt_tokens=67 * 19 + 512 * step,
            prefill_steps=19 + step,
            prefill_s=19 + 7.0 * step,
        )
        pools.read()
    assert "73 tokens/s" in str(pools.refusal(500))


def test_a_prompt_that_is_given_up_is_no_longer_in_the_way_of_the_next() -> None:
    pools = build()
    ticket = pools.admit(8191)
    pools.now_s += 2.0
    pools.queue(7369)  # the rest is computed
    pools.refusal(8191)
    ticket.close()
    assert not pools.outlook().is_queue
    pools.admit(8191)


def test_seats_of_calls_that_have_ended_are_free_before_the_next_reading() -> None:
    pools = build()
    tickets = [pools.admit(1) for _ in range(8)]
    pools.now_s += 2.0
    for finished in range(1, 10):
        pools.decode["d"] = replace(IDLE, num_running=8, num_used_blocks=1000, finished=finished)
        pools.read()
    assert pools.outlook(DECODE).seat_wait.low > 0
    for ticket in tickets:
        ticket.close()
    assert not pools.outlook(DECODE).is_queue


def test_a_full_decode_pool_makes_everybody_wait_for_a_seat() -> None:
    pools = build()
    for finished in range(10, 60, 10):  # 8 seats, 10 sequences per second: held for 0.8 s
        pools.decode["d"] = replace(IDLE, num_running=8, finished=finished)
        pools.read()
    assert pools.outlook(DECODE).seat_wait.best == pytest.approx(0.1)
    pools.decode["d"] = replace(pools.decode["d"], num_waiting=60, finished=60)
    pools.read()
    assert pools.outlook(DECODE).wait.best == pytest.approx(6.2), "behind 60, and one that may overtake it"
    pools.admit(10)
    pools.decode["d"] = replace(pools.decode["d"], num_waiting=79, finished=70)
    pools.read()
    pools.admit(10)  # 8.1 s, but of how long a seat is held only some thirty sequences tell
    pools.decode["d"] = replace(pools.decode["d"], num_waiting=99, finished=80)
    pools.read()
    assert "may take 10.1 s" in str(pools.refusal(10))


def test_blocks_bound_the_seats_too() -> None:
    pools = build()
    for finished in range(2, 12, 2):  # 2 sequences have all the blocks, each for a second
        pools.decode["d"] = replace(IDLE, num_running=2, num_used_blocks=1000, finished=finished)
        pools.read()
    assert pools.outlook(DECODE).seat_wait.best == pytest.approx(0.5)


def test_what_serve_holds_back_waits_for_a_seat_as_well() -> None:
    pools = build()
    for finished in range(10, 60, 10):
        pools.decode["d"] = replace(IDLE, num_running=8, finished=finished)
        pools.read()
    for _ in range(30):
        pools.admit(1)
    pools.decode["d"] = replace(pools.decode["d"], finished=60)
    pools.read()  # no engine has seen them
    assert pools.outlook(DECODE).seat_wait.best == pytest.approx(24 * 0.1)


def test_before_a_cost_is_measured_only_the_token_bound_holds() -> None:
    pools = Pools(replace(BOUNDS, max_queued_tokens=1000), cost=StepCost())
    pools.read()
    pools.admit(700)
    assert pools.refusal(200).retry_after_s == 1.0
    assert pools.admission.refusals == {(Reason.QUEUED_TOKENS, Priority.NORMAL): 1}


def test_without_readings_what_was_let_in_stands_for_the_queue() -> None:
    pools = build()
    pools.queue(700)
    pools.now_s += MAX_AGE_S + 1
    tickets = [pools.admit(100) for _ in range(6)]
    assert pools.outlook().queued_tokens == 600
    pools.now_s += MAX_AGE_S + 1
    pools.refusal(200)
    for ticket in tickets:
        ticket.close()
    pools.admit(200)
    pools.now_s += MAX_AGE_S + 1
    pools.admit(200)
    admission = pools.admission
    noted = [own.num_noted for own in (*admission.own_tokens.values(), admission.own_sequences)]
    assert noted == [0, 1, 1], "nothing is kept"


def test_a_holding_time_stays_while_nothing_finishes_and_forgets_what_is_long_ago() -> None:
    held = HoldingTime(half_life=10.0)
    assert held.value is None
    held.add(100.0, 1)
    held.add(0.0, 0)
    assert held.value is not None and held.value.best == 100
    assert held.value.low < 50, "one sequence tells little"
    for _ in range(100):
        held.add(20.0, 1)
    assert held.value is not None and held.value.best == pytest.approx(20, rel=0.01)
    assert 15 < held.value.low < held.value.best < held.value.high < 28


def test_what_an_engine_did_before_it_was_seen_counts_if_its_start_is_a_small_part_of_it() -> None:
    for seconds, is_measured in ((1.0, False), (1000.0, True)):
        pools = Pools(BOUNDS, cost=StepCost(), prefill={"p": worked(IDLE, seconds)})
        pools.read()
        assert (pools.outlook().speed is not None) == is_measured


def test_while_a_pool_has_no_engine_its_costs_are_those_last_seen() -> None:
    pools = Pools(BOUNDS, prefill={"p": replace(IDLE, max_num_batched_tokens=512)})
    pools.read()
    before = pools.outlook().first_token(5000)
    pools.prefill = {}
    pools.read()
    assert pools.outlook().first_token(5000) == before


def test_a_replaced_engine_goes_on_from_what_is_known_of_the_one_before() -> None:
    pools = build()
    pools.prefill = {"new": worked(IDLE, 2.0, tokens_per_s=1.0)}  # cold
    pools.read()
    assert pools.outlook().speed == pytest.approx(100)
    pools.prefill = {"new": worked(pools.prefill["new"], 10.0, tokens_per_s=50.0)}
    pools.read()
    assert 50 < (pools.outlook().speed or 0.0) < 100


def test_what_another_ingress_has_queued_is_doubted_until_it_is_read_again() -> None:
    pools = build()
    pools.decode["d"] = replace(IDLE, num_receivers=2)
    pools.queue(2_000)
    assert not pools.admission.is_in_doubt([500], Priority.NORMAL, A)  # just read
    pools.now_s += 0.5
    assert pools.admission.is_in_doubt([500], Priority.NORMAL, A)
    assert not pools.admission.is_in_doubt([50], Priority.NORMAL, A)  # the decode pool's, where nothing waits
    assert not pools.admission.refusals
    pools.queue(0)
    pools.admit(500)


def test_a_lone_ingress_has_nothing_to_doubt() -> None:
    pools = build()
    pools.queue(2_000)
    pools.now_s += 0.5
    assert not pools.admission.is_in_doubt([500], Priority.NORMAL, A)
    pools.refusal(500)
    assert pools.admission.refusals == {(Reason.TTFT, Priority.NORMAL): 1}
