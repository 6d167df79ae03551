"""Notes, twice a second, how many nodes and replicas there are, and how many are wanted."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from tests.bench.autoscale.cluster import POOLS, engine_resource

_PERIOD_S = 0.5
_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")


@dataclass(frozen=True, slots=True)
class Moment:
    """What was there; by pool, as all the rest.

    Attributes:
        at_s: when, since the load began.
        targets: replicas that the planner wants.
        replicas: that serve.
        nodes: that are there.
        started: nodes that have been there, in all.
    """

    at_s: float
    targets: dict[str, int]
    replicas: dict[str, int]
    nodes: dict[str, int]
    started: dict[str, int]


class Watch:
    """Looks from a thread, for as long as it is entered."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.began_s = time.monotonic()
        self._controller: Any = ray.get_actor(*_CONTROLLER)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: Exception | None = None
        self._seen: dict[str, set[str]] = {pool: set() for pool in POOLS}

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._ended.wait(_PERIOD_S):
                self.moments.append(self._look())
        except Exception as error:  # told where the bench waits
            self._error = error

    def _look(self) -> Moment:
        (application,) = ray.get(self._controller.get_serve_instance_details.remote())["applications"].values()
        deployments = {pool: application["deployments"][pool.capitalize()] for pool in POOLS}
        alive = {pool: nodes_of(pool) for pool in POOLS}
        for pool in POOLS:
            self._seen[pool] |= alive[pool]
        return Moment(
            time.monotonic() - self.began_s,
            {pool: details["target_num_replicas"] for pool, details in deployments.items()},
            {pool: _num_serving(details) for pool, details in deployments.items()},
            {pool: len(names) for pool, names in alive.items()},
            {pool: len(names) for pool, names in self._seen.items()},
        )


def nodes_of(pool: str) -> set[str]:
    """The nodes of a pool's type that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and engine_resource(pool) in node["Resources"]}


def _num_serving(details: dict[str, Any]) -> int:
    return sum(replica["state"] == "RUNNING" for replica in details["replicas"])
