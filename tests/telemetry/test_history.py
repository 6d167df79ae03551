"""The last minutes in slots: what was done in each, who came and is gone; what was there before is past."""

import pytest

from deployments.load.reading import DECODE, PREFILL
from deployments.telemetry.history import GONE_S, NUM_SLOTS, SLOT_S
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
