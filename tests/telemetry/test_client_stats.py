"""What clients see is counted: whole calls that ended well, by length and by why they ended."""

from dataclasses import replace

from deployments.api.observer import Outcome
from deployments.telemetry.client_stats import ClientCounts
from tests.telemetry.calls import CALL


def test_a_call_that_ended_well_has_its_length_and_its_reasons_counted() -> None:
    counts = ClientCounts()
    counts.call_ended(CALL)
    counts.call_ended(replace(CALL, outcome=Outcome.ABORTED))
    stats = counts.stats
    for histogram, value in ((stats.call_s, 1.5), (stats.prompt_tokens, 12), (stats.generated_tokens, 3)):
        assert (sum(histogram.counts), histogram.total) == (1, value)
    assert stats.finish_reasons == {"stop": 1, "length": 1}


def test_a_snapshot_stays_as_it_was() -> None:
    counts = ClientCounts()
    before = counts.stats.copy()
    counts.request_started()
    counts.first_token(0.1)
    counts.inter_token(0.1, 1)
    counts.request_denied("unauthorized")
    counts.request_resumed()
    counts.request_finished(Outcome.OK)
    counts.call_ended(CALL)
    assert before == ClientCounts().stats != counts.stats
