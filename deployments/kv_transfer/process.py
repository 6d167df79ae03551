"""What the source's and the receiver's side of one process share: who it is, and what it counts."""

from dataclasses import replace
from threading import Lock

import ray

from deployments.kv_transfer.base import TransferStats


class Counters:
    """Numbers of one process; safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._stats = TransferStats()

    def add(self, **increments: float) -> None:
        """Count what has happened; names are those of `TransferStats`."""
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + by for name, by in increments.items()}
            )

    def read(self) -> TransferStats:
        return self._stats


def actor_id() -> str:
    """Of the engine that this process is."""
    found = ray.get_runtime_context().get_actor_id()
    assert found is not None, "KV moves between actors only"
    return found


def node_ip() -> str:
    """Address at which others reach this process."""
    return str(ray.util.get_node_ip_address())
