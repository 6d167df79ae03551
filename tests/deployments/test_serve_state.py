"""Where the API listens, and what is said of it when there are no keys."""

import pytest

from deployments.ingress import warn_if_open
from deployments.serve_state import is_loopback

LOCAL: list[str | None] = [None, "localhost", "127.0.0.1", "127.3.4.5", "::1"]
OPEN: list[str | None] = ["0.0.0.0", "::", "10.0.0.7", "", "gpu-node-1"]


@pytest.mark.parametrize("host", LOCAL + OPEN)
def test_only_this_machine_reaches_a_loopback_address(host: str | None) -> None:
    assert is_loopback(host) is (host in LOCAL)


@pytest.mark.parametrize("host", LOCAL + OPEN)
def test_a_service_without_keys_warns_where_others_reach_it(host: str | None, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_open(host)
    assert ("NO API KEYS" in caplog.text) is (host in OPEN)
