"""Who is let in of several: priorities and keys have their shares, and nothing is counted for ever."""

import copy
import math
import pickle
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from deployments.errors import OverloadedError, RequestTooLargeError
from deployments.load.admission import SHARES, Bounds, Reason
from deployments.load.reading import DECODE, PREFILL
from deployments.load.step_cost import StepCost
from deployments.messages import Priority
from tests.load.pools import IDLE, A, B, Pools, build, measured


def test_more_prompt_tokens_than_may_ever_queue_are_no_matter_of_time() -> None:
    pools = build(max_queued_tokens=1000)
    with pytest.raises(RequestTooLargeError, match="1200 prompt tokens, of which at most 1000"):
        pools.admit(600, 600)
    pools.prefill["q"] = IDLE
    pools.read()
    pools.admit(600, 600)


def test_all_prompts_of_a_call_count() -> None:
    pools = build()
    pools.queue(100)
    pools.refusal(*[100] * 8)
    pools.admit(*[100] * 3)


@pytest.mark.parametrize(("queued", "admitted"), [(300, "high normal low"), (600, "high normal"), (800, "high")])
def test_the_lower_the_priority_the_earlier_it_is_refused(queued: int, admitted: str) -> None:
    for priority in Priority:
        pools = build()
        pools.queue(queued)
        if priority.name.lower() in admitted.split():
            pools.admit(100, priority=priority)
        else:
            pools.refusal(100, priority=priority)


def test_once_half_is_used_a_key_gets_no_more_than_its_share() -> None:
    pools = build()
    pools.admit(100, key=B).close()
    for taken in range(0, 300, 100):
        pools.queue(taken)
        pools.admit(100)
    pools.queue(300)
    error = pools.refusal(100)
    assert "this API key has 300 prompt tokens waiting, each of 2 keys may have 323" in str(error)
    assert error.retry_after_s == pytest.approx(0.77, rel=0.01)
    pools.admit(100, key=B)
    assert pools.admission.refusals == {(Reason.FAIR_SHARE, Priority.NORMAL): 1}


def test_a_key_that_is_alone_may_have_it_all_and_the_others_are_forgotten_in_time() -> None:
    pools = build()
    pools.admit(100, key=B).close()
    pools.now_s += 61.0
    for taken in range(0, 600, 100):
        pools.queue(taken)
        pools.admit(100)
    assert pools.admission.active_keys == {A}


def test_a_key_with_nothing_waiting_is_not_refused_for_the_many_that_call() -> None:
    pools = build()
    for number in range(500):
        pools.admit(100, key=str(number).encode()).close()
    pools.queue(450)
    pools.admit(100, key=B)
    pools.refusal(100, key=B)
    assert pools.admission.refusals == {(Reason.FAIR_SHARE, Priority.NORMAL): 1}


def test_an_overloaded_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(OverloadedError("full", 3.5)))
    assert (str(error), error.retry_after_s) == ("full", 3.5)


COSTS = {0.0: StepCost(), 20.0: measured(20.0), 500.0: measured(500.0)}
calls = st.lists(
    st.tuples(
        st.lists(st.integers(1, 400), min_size=1, max_size=4),
        st.sampled_from(Priority),
        st.sampled_from([A, B, b"c"]),
        st.floats(0, 3),
        st.sampled_from(["stay", "first token", "close", "close twice"]),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(calls=calls, speed=st.sampled_from(list(COSTS)), reads=st.booleans(), receivers=st.integers(1, 3))
def test_bounds_hold_and_every_closed_ticket_leaves_nothing(calls, speed, reads, receivers) -> None:
    bounds = Bounds(max_ttft_s=10.0, max_queued_tokens=1000, min_remote_tokens=100)
    pools = Pools(bounds, cost=copy.copy(COSTS[speed]))
    engine = replace(IDLE, num_receivers=receivers)
    pools.prefill, pools.decode = {"p": engine}, {"d": engine}
    admission, tickets = pools.admission, []
    for sizes, priority, key, pause_s, fate in calls:
        pools.now_s += pause_s
        if reads:
            queued = admission.own_tokens[PREFILL].total
            pools.prefill = {"p": replace(engine, num_queued_prompt_tokens=queued)}
            pools.read()
        try:
            ticket = pools.admit(*sizes, priority=priority, key=key)
        except OverloadedError as error:
            assert 0 < error.retry_after_s < math.inf  # noqa: PT017  either outcome is right, a third is not
        except RequestTooLargeError:
            assert sum(sizes) > 1000
        else:
            tickets.append(ticket)
            if fate == "first token":
                ticket.first_token(0)
            elif fate != "stay":
                ticket.close()
        if tickets and fate == "close twice":
            tickets[-1].close()
        for pool in (PREFILL, DECODE):
            assert 0 <= admission.own_tokens[pool].total <= 1000
            assert pools.outlook(pool).queued_tokens <= admission.own_tokens[pool].total * receivers + 400
    for ticket in tickets:
        ticket.close()
        ticket.close()
    assert not admission.waiting and not admission.own_sequences.total
    assert not any(own.total for own in admission.own_tokens.values())


@given(
    queued=st.integers(1, 3000),
    own=st.integers(100, 1500),
    priority=st.sampled_from(Priority),
    num_engines=st.integers(1, 3),
)
def test_a_client_that_waits_as_told_is_let_in_if_nobody_else_came(queued, own, priority, num_engines) -> None:
    pools = build()
    pools.prefill = {str(i): IDLE for i in range(num_engines)}
    pools.prefill["0"] = replace(IDLE, num_queued_prompt_tokens=queued)
    pools.read()
    try:
        pools.admit(own, priority=priority)
    except OverloadedError as error:
        pools.now_s += error.retry_after_s + 1e-6
        rate = 100 * num_engines
        pools.prefill["0"] = replace(IDLE, num_queued_prompt_tokens=int(queued - error.retry_after_s * rate))
        pools.now_s -= 1.0
        pools.read()
        pools.admit(own, priority=priority)


def test_high_priority_may_use_all_of_the_bounds() -> None:
    assert SHARES == {Priority.LOW: 0.5, Priority.NORMAL: 0.8, Priority.HIGH: 1.0}
