"""What became of every request: each way to fail is counted as what it is, and held against its bound."""

import pytest

from tests.bench.chaos.load import FOREIGN, Ending, Record
from tests.bench.chaos.probes import Call, Probe
from tests.bench.chaos.storm import Done, Fault, Kind, Pool
from tests.bench.chaos.verdict import (
    MAX_FAILED_SHARE,
    Outcome,
    Reference,
    decide,
    find_leaks,
    first_difference,
    judge,
    longest_wait_s,
)

TOKENS = [5, 6, 7, 8]
PROBE = Probe(number=0, prompt=(1, 2), max_tokens=len(TOKENS), temperature=0.0, seed=0)
IDLE = {("decode", "a"): {"kv_blocks_used": 0.0, "running_sequences": 0.0}}


def record(ending=Ending.WHOLE, tokens=TOKENS, status=200, error=None, sent_s=0.0, end_s=4.0, leaves_after_s=None):
    times_s = [sent_s + 1 + i for i in range(len(tokens))]
    call = Call(PROBE, stream=True, leaves_after_s=leaves_after_s)
    return Record(call, sent_s, list(tokens), times_s, status, error, ending, end_s)


def done(kind=Kind.ENGINE_KILL, at_s=2.0, recovery_s=10.0, error=None):
    pool = Pool.INGRESS if kind is Kind.INGRESS_KILL else Pool.DECODE
    return Done(Fault(at_s, kind, pool, 0.0), at_s, "Decode 1", recovery_s, error)


def verdict(records, faults=(), num_planned=0, answers=(TOKENS, TOKENS), holdings=IDLE):
    return decide(records, Reference({0: answers}), faults, num_planned, holdings, num_engines=1)


FAILURES = {
    Outcome.FINISHED: record(),
    Outcome.LEFT: record(Ending.LEFT, TOKENS[:1], leaves_after_s=1.0),
    Outcome.REFUSED: record(Ending.HTTP_ERROR, [], 429, "overloaded"),
    Outcome.FAILED: record(Ending.HTTP_ERROR, [], 503, "engine_unavailable"),
    Outcome.LOST: record(Ending.NO_ANSWER, [], None),
}


@pytest.mark.parametrize(("outcome", "seen"), FAILURES.items())
def test_each_way_to_end_is_an_outcome_of_its_own(outcome, seen):
    assert judge(seen, []) is outcome


CUTS = [
    record(Ending.CONNECTION, TOKENS[:2], 200, "RemoteProtocolError"),
    record(Ending.CONNECTION, [], None, "ReadError"),
    record(Ending.HTTP_ERROR, [], 500, FOREIGN),
]


@pytest.mark.parametrize("cut", CUTS)
def test_a_connection_cut_with_its_ingress_is_excused_and_no_other(cut):
    assert judge(cut, [3.5]) is Outcome.INGRESS
    for kill_s in (
        2.5,  # it ended long after the kill
        4.5,  # before the kill
        -0.5,  # it was sent after the kill
    ):
        assert judge(cut, [kill_s]) is Outcome.FAILED


def test_an_error_of_the_service_is_not_excused_by_the_death_of_an_ingress():
    assert judge(record(Ending.HTTP_ERROR, [], 503, "engine_unavailable"), [3.5]) is Outcome.FAILED
    assert judge(record(Ending.ERROR_EVENT, TOKENS[:2], 200, "engine_unavailable"), [3.5]) is Outcome.FAILED


def test_failures_are_counted_by_what_clients_saw():
    seen = [
        FAILURES[Outcome.FAILED],
        FAILURES[Outcome.FAILED],
        record(Ending.ERROR_EVENT, TOKENS[:2], 200, "engine_unavailable"),
        record(Ending.CONNECTION, [], None, "ConnectError"),
        FAILURES[Outcome.LOST],
    ]
    assert verdict(seen).failed == {
        "HTTP error 503, engine_unavailable": 2,
        "error event, engine_unavailable": 1,
        "connection error, ConnectError": 1,
    }


@pytest.mark.parametrize(
    ("found", "is_whole", "at"),
    [
        (TOKENS, True, None),
        (TOKENS[:2], False, None),
        ([], False, None),
        (TOKENS[:2], True, 2),
        ([5, 6, 9, 8], True, 2),
        ([5, 9], False, 1),
        ([*TOKENS, 9], False, 4),
    ],
)
def test_tokens_differ_where_the_first_one_does_or_where_a_whole_answer_ends_early(found, is_whole, at):
    assert first_difference(found, TOKENS, is_whole) == at


def test_tokens_of_a_cut_answer_are_compared_too():
    found = verdict([record(Ending.ERROR_EVENT, [5, 9], 200, "engine_unavailable")])
    assert [(one.probe, one.at, one.outcome) for one in found.differences] == [(0, 1, Outcome.FAILED)]


def test_an_answer_is_right_if_the_probe_was_ever_answered_so_without_faults():
    other = [5, 6, 9, 9]
    found = verdict([record(), record(tokens=other), record(tokens=[5, 6, 8, 8])], answers=(TOKENS, other))
    assert found.unstable == (0,)
    assert [one.at for one in found.differences] == [2]


def test_whatever_an_engine_holds_at_the_end_is_a_leak_by_its_name():
    holdings = {**IDLE, ("prefill", "b"): {"exported_blocks": 3.0, "kv_blocks_used": 0.0}}
    assert find_leaks(holdings) == {"prefill b": {"exported_blocks": 3.0}}
    assert find_leaks(IDLE) == {}


def test_a_storm_that_everybody_survived_has_no_problem():
    found = verdict([record()] * 1000 + [FAILURES[Outcome.FAILED]] * 5, [done()], num_planned=1)
    assert found.failed_share <= MAX_FAILED_SHARE
    assert found.problems() == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (verdict([record()] * 100 + [FAILURES[Outcome.FAILED]]), "0.99% of requests failed"),
        (verdict([record()] * 1000 + [FAILURES[Outcome.LOST]]), "1 requests lost"),
        (verdict([record(tokens=[5, 6, 7, 9])]), "1 answers with different tokens"),
        (verdict([record()], answers=(TOKENS, [5, 9])), "1 probes differ without faults"),
        (verdict([record()], holdings={("decode", "a"): {"kv_blocks_used": 1.0}}), "1 engines hold"),
        (verdict([record()], holdings={}), "1 engines do not say"),
        (verdict([record()], [done(recovery_s=None, error="not back")], 1), "engine killed, Decode 1: not back"),
        (verdict([record()], [done()], 2), "1 of 2 faults"),
    ],
)
def test_each_bound_that_is_broken_is_a_problem_of_its_own(found, problem):
    assert any(problem in words for words in found.problems())


def test_clients_who_left_refusals_and_the_dead_ingress_own_clients_are_no_failures():
    seen = [record(), FAILURES[Outcome.LEFT], FAILURES[Outcome.REFUSED], CUTS[0]]
    found = verdict(seen, [done(Kind.INGRESS_KILL, at_s=3.5)], 1)
    assert found.failed_share == 0
    assert found.num_sent == 4
    assert found.outcomes[Outcome.INGRESS] == 1


def test_recovery_is_told_by_kind_with_the_longest_wait_around_it():
    faults = [done(recovery_s=seconds) for seconds in (10.0, 20.0, 90.0)] + [done(Kind.SCALE_UP, recovery_s=5.0)]
    found = verdict([record(), record(sent_s=200.0, end_s=300.0)], faults, 4).recoveries
    assert set(found) == {Kind.ENGINE_KILL, Kind.SCALE_UP}
    killed = found[Kind.ENGINE_KILL]
    assert (killed.num, killed.p50_s, killed.p99_s, killed.longest_wait_s) == (3, 20.0, 90.0, 1.0)


def test_only_waits_that_touch_the_time_of_a_fault_count_for_it():
    stream = Record(Call(PROBE), 0.0, TOKENS, [1.0, 2.0, 9.0], 200, None, Ending.WHOLE, 9.5)
    assert longest_wait_s([stream], 0.0, 1.5) == 1.0
    assert longest_wait_s([stream], 3.0, 4.0) == 7.0
    assert longest_wait_s([stream], 20.0, 30.0) == 0.0
