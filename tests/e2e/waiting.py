"""Whether the engines of a running application have nothing left to do."""

import time

from tests.e2e.conftest import Service


def idle(service: Service) -> bool:
    stats = [row.engine for pool in service.pools for row in service.stats(pool)]
    return all(
        s.num_used_blocks == s.num_running == s.num_reserved == s.num_waiting == s.num_exported_blocks == 0
        for s in stats
    )


def wait_idle(service: Service, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not idle(service):
        assert time.monotonic() < deadline, [service.stats(pool) for pool in service.pools]
        time.sleep(0.02)
