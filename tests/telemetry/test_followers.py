"""Whoever follows calls is told of each, and harms none by failing."""

import logging

import pytest

from deployments.api.observer import EndedCall, Outcome
from deployments.telemetry.client_stats import ClientCounts
from deployments.telemetry.followers import ObservedCalls
from tests.telemetry.calls import CALL


def test_a_follower_that_fails_is_logged_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[EndedCall] = []

    def fail(call: EndedCall) -> None:
        raise ValueError("full")

    observed = ObservedCalls(ClientCounts(), [fail, told.append])
    with caplog.at_level(logging.ERROR):
        observed.call_ended(CALL)
    assert told == [CALL]
    assert "ValueError: full" in caplog.text


def test_what_is_told_of_a_call_is_counted_and_receipts_are_wanted_where_somebody_follows() -> None:
    counts = ClientCounts()
    observed = ObservedCalls(counts, [])
    observed.request_started()
    observed.first_token(0.5)
    observed.inter_token(0.01, 2)
    observed.request_finished(Outcome.OK)
    stats = counts.stats
    assert (stats.num_in_flight, stats.finished["ok"], sum(stats.ttft_s.counts), sum(stats.itl_s.counts)) == (
        0,
        1,
        1,
        2,
    )
    assert not observed.wants_receipts and ObservedCalls(counts, [lambda call: None]).wants_receipts
