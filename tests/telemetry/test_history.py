"""The last minutes in slots: what was done in each, who came and is gone; what was there before is past."""

import pytest

from deployments.load.reading import DECODE, PREFILL
from deployments.telemetry.history import GONE_S, LOST_S, NUM_SLOTS, SLOT_S
from tests.telemetry.minutes import Service


@pytest.fixture
def service() -> Service:
    return Service()


def test_a_slot_holds_what_was_done_in_it_and_how_the_pools_were_at_its_end(service: Service) -> None:
    prefill, decode = service.start(PREFILL, "p"), service.start(DECODE, "d")

    def work() -> None:
        prefill.prompt_tokens += 100
        decode.generated_tokens += 7
        service.clients.first_token(0.3)
        service.clients.inter_token(0.02, 7)

    service.run(3 * SLOT_S, work)
    prefill.num_queued_prompt_tokens, decode.num_used_blocks = 50, 4
    service.refusals["ttft", "low"] += 2
    service.run(SLOT_S, work)
    *_, before, last = service.history.slots
    assert (last.number - before.number, last.seconds) == (1, SLOT_S)
    assert last.pools[PREFILL].counts["prompt_tokens"] == 500 and last.pools[DECODE].counts["generated_tokens"] == 35
    assert (last.pools[PREFILL].num_queued_tokens, last.pools[DECODE].num_used_blocks) == (50, 4)
    assert (sum(last.clients.ttft), sum(last.clients.itl)) == (5, 35)
    assert last.clients.refusals == {("ttft", "low"): 2} and not before.clients.refusals


def test_what_engines_had_done_before_the_ingress_started_is_past_and_what_newcomers_did_counts(
    service: Service,
) -> None:
    service.start(DECODE, "old", generated_tokens=10_000)
    service.run(SLOT_S)
    assert service.history.slots[-1].pools[DECODE].counts["generated_tokens"] == 0
    service.start(DECODE, "new", generated_tokens=30)
    service.run(SLOT_S)
    assert service.history.slots[-1].pools[DECODE].counts["generated_tokens"] == 30


def test_replicas_that_come_and_go_are_told_of(service: Service) -> None:
    service.start(DECODE, "a")
    service.start(DECODE, "b")
    service.run(2)
    assert not service.history.events, "they were there"
    del service.engines[DECODE]["b"]
    service.run(1)
    gone_s = service.now_s
    service.start(DECODE, "c")
    service.run(1)
    told = [(event.at_s, event.pool, event.replica, event.kind) for event in service.history.events]
    assert told == [(gone_s, DECODE, "b", "gone"), (gone_s + 1, DECODE, "c", "came")]
    assert service.history.gone == {(DECODE, "b"): gone_s}
    service.run(GONE_S)
    assert not service.history.gone and service.history.replicas[DECODE].keys() == {"a", "c"}


def test_the_last_replica_of_a_pool_that_cannot_be_read_is_gone_once_serve_says_that_none_runs(
    service: Service,
) -> None:
    service.start(DECODE, "a")
    service.start(PREFILL, "p")
    service.run(2)
    del service.engines[DECODE]["a"]
    service.unread.add(DECODE)
    service.run(LOST_S)
    assert DECODE in service.history.replicas, "nobody has said anything of it"
    service.history.note_states({DECODE: {"STARTING": 1}, PREFILL: {"STARTING": 1}})
    assert not service.history.events, "Serve's word may be as old"
    service.run(1)
    service.history.note_states({DECODE: {"STARTING": 1, "STOPPING": 1}})
    assert not service.history.events, "that one may answer yet"
    service.history.note_states({DECODE: {"STARTING": 1}, PREFILL: {"STARTING": 1}})
    (event,) = service.history.events
    assert (event.at_s, event.pool, event.replica, event.kind) == (service.now_s, DECODE, "a", "gone")
    assert service.history.gone == {(DECODE, "a"): service.now_s} and service.history.replicas[PREFILL].keys() == {"p"}
    service.start(DECODE, "b")
    service.unread.clear()
    service.run(1)
    assert [event.kind for event in service.history.events] == ["gone", "came"]


def test_an_engine_that_is_silent_was_heard_when_it_spoke_last(service: Service) -> None:
    service.start(PREFILL, "p")
    service.silent_s["p"] = 12.0
    service.run(1)
    assert service.history.replicas[PREFILL]["p"].heard_s == service.now_s - 12.0


def test_only_the_last_slots_are_kept_whatever_comes(service: Service) -> None:
    service.start(DECODE, "a")
    service.run((NUM_SLOTS + 10) * SLOT_S)
    assert len(service.history.slots) == NUM_SLOTS


def test_a_replica_that_flips_is_not_gone_and_what_it_did_is_not_counted_again(service: Service) -> None:
    service.start(DECODE, "a", generated_tokens=1_000_000)
    service.run(SLOT_S)
    for before, after in ((DECODE, PREFILL), (PREFILL, DECODE)):
        engine = service.engines[before].pop("a")
        engine.generated_tokens += 3
        service.engines[after]["a"] = engine
        service.run(SLOT_S)
        assert service.history.slots[-1].pools[after].counts["generated_tokens"] == 3
    told = [(event.pool, event.replica, event.kind) for event in service.history.events]
    assert told == [(PREFILL, "a", "flipped"), (DECODE, "a", "flipped")] and not service.history.gone


def test_what_a_replica_did_before_it_flips_or_is_gone_counts_for_the_pool_that_it_was_in(service: Service) -> None:
    flips, dies = service.start(DECODE, "flips"), service.start(DECODE, "dies")
    service.run(SLOT_S)

    def decode() -> None:
        flips.generated_tokens += 10
        dies.generated_tokens += 1

    service.run(3, decode)
    service.engines[PREFILL]["flips"] = service.engines[DECODE].pop("flips")
    del service.engines[DECODE]["dies"]
    flips.prompt_tokens += 100
    service.run(SLOT_S - 3)
    pools = service.history.slots[-1].pools
    assert pools[DECODE].counts == {"generated_tokens": 33}
    assert pools[PREFILL].counts == {"prompt_tokens": 100}
    service.run(SLOT_S)
    assert not service.history.slots[-1].pools[DECODE].counts, "all of it was counted"


def test_a_replica_that_did_not_answer_for_a_while_goes_on_where_it_was(service: Service) -> None:
    engine = service.start(DECODE, "a", generated_tokens=1_000_000)
    service.run(SLOT_S)
    silent = service.engines[DECODE].pop("a")
    service.run(SLOT_S)
    engine.generated_tokens += 4
    service.engines[DECODE]["a"] = silent
    service.run(SLOT_S)
    assert service.history.slots[-1].pools[DECODE].counts == {"generated_tokens": 4}


def test_a_pool_that_did_not_answer_is_as_it_was_and_the_other_is_seen(service: Service) -> None:
    prefill = service.start(PREFILL, "p")
    decode = service.start(DECODE, "d", generated_tokens=1_000_000)
    service.unread = {DECODE}
    service.run(SLOT_S)
    assert DECODE not in service.history.slots[-1].pools
    service.unread = set()
    service.run(SLOT_S)
    assert not service.history.slots[-1].pools[DECODE].counts, "what it had done when it was first read is past"
    assert not service.history.events
    service.unread = {DECODE}
    prefill.prompt_tokens, decode.generated_tokens = 7, 1_000_003
    service.run(SLOT_S)
    heard_s = {name: known.heard_s for of in service.history.replicas.values() for name, known in of.items()}
    assert heard_s == {"p": service.now_s, "d": service.now_s - SLOT_S}
    assert service.history.slots[-1].pools[PREFILL].counts == {"prompt_tokens": 7}
    service.unread = set()
    service.run(SLOT_S)
    assert service.history.slots[-1].pools[DECODE].counts == {"generated_tokens": 3}
