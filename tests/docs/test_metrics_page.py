"""What docs/metrics.md says beside its tables, which `tests/e2e/test_metrics.py` holds to a running system."""

import re

from deployments.engine.stats import LATENCY_BUCKETS_S
from deployments.telemetry.client_stats import CALL_BUCKETS_S
from tests.docs.pages import ROOT


def test_the_page_names_the_ends_of_all_buckets_of_seconds() -> None:
    (sentence,) = re.findall(
        r"Buckets of seconds end at (.*?\.) ", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL
    )
    of_tokens, more_of_calls = [tuple(map(float, span.split())) for span in re.findall(r"`([^`]*)`", sentence)]
    assert of_tokens == LATENCY_BUCKETS_S
    assert of_tokens + more_of_calls == CALL_BUCKETS_S
