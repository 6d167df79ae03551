"""Whether the engines of a running application have nothing left to do, and the ingress knows what they know."""

from tests.e2e.conftest import ANSWER_TIMEOUT_S, Service
from tests.waiting import wait_until


def idle(service: Service) -> bool:
    stats = [row.engine for pool in service.pools for row in service.stats(pool)]
    return all(
        s.num_used_blocks == s.num_running == s.num_reserved == s.num_waiting == s.num_exported_blocks == 0
        for s in stats
    )


def wait_idle(service: Service, timeout_s: float) -> None:
    wait_until(lambda: idle(service), timeout_s, lambda: [service.stats(pool) for pool in service.pools])


def wait_for_a_reading(service: Service) -> None:
    """What the engines know by now the ingress knows as well."""
    wait_idle(service, ANSWER_TIMEOUT_S)
    # One reading may have begun before.
    enough = service.metric("kvrelay_readings_total") + 2
    wait_until(lambda: service.metric("kvrelay_readings_total") >= enough, ANSWER_TIMEOUT_S)
