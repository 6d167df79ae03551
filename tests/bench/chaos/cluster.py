"""The service under test: brought up as `make serve` does, its replicas with their processes, and what it holds.

Sees it from outside, through Serve's controller, Ray's table of actors, the processes and `/metrics`; it does no harm
to it. That is `faults.py`'s business.
"""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray._private import ray_constants
from ray._private import state as ray_state
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from app.local import down, up
from app.local_process import RunFolder, Server
from tests.bench.chaos import scaling
from tests.bench.chaos.storm import ENGINE_POOLS, Pool

START_TIMEOUT_S = 600.0
# What an engine may hold for requests; with none it holds nothing.
HELD = (
    "kv_blocks_used", "exported_blocks", "reserved_sequences", "waiting_sequences", "running_sequences",
    "queued_prompt_tokens",
)  # fmt: skip
_GAUGE = re.compile(r'^kvrelay_(\w+)\{pool="(\w+)",replica="(\w+)"\} (\S+)$', re.MULTILINE)
_METRICS_TIMEOUT_S = 20.0
_POLL_S = 0.5
_GCS_ARGUMENT = "--gcs-address="
_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")

# By pool and replica: gauge to value.
Holdings = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica, as Serve has it.

    Attributes:
        pool: its deployment.
        id: as in the labels of `/metrics`.
        is_running: whether Serve sends it requests.
        front: process of the replica.
        engine: process of its engine; None: it has none, or none yet, or it is dead.
    """

    pool: Pool
    id: str
    is_running: bool
    front: psutil.Process | None
    engine: psutil.Process | None

    @property
    def is_healthy(self) -> bool:
        """Whether it serves, with every process that it needs alive and not stopped."""
        needed = [self.front, self.engine] if self.pool in ENGINE_POOLS else [self.front]
        return self.is_running and all(process is not None and _runs(process) for process in needed)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    return False


def _process(pid: int | None) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid) if pid else None
    return None


class Cluster:
    """The service that is up; one for each process, since Ray's driver is. Calls to Ray block for milliseconds.

    Args:
        server: its processes.
        model: its name in the API.
        wanted: how many replicas each pool shall have.
        replicas_file: where the pools read that.
    """

    def __init__(self, server: Server, model: str, wanted: dict[Pool, int], replicas_file: Path) -> None:
        self.server = server
        self.url = server.url
        self.model = model
        self.wanted = wanted
        self._replicas_file = replicas_file
        self._controller: Any = ray.get_actor(*_CONTROLLER)

    def scale(self, pool: Pool, num_replicas: int) -> None:
        """Tell a pool how many replicas it shall have; returns before it has them."""
        self.wanted[pool] = num_replicas
        write_wanted(self._replicas_file, self.wanted)

    def replicas(self) -> list[Replica]:
        """Every replica that Serve has not forgotten, those that start or stop among them."""
        actors = live_actors()
        engines = {_owner(actor): actor["Pid"] for actor in actors if actor["ActorClassName"] == "EngineActor"}
        addresses = {actor["ActorID"]: _address(actor["Address"]) for actor in actors}
        details = ray.get(self._controller.get_serve_instance_details.remote())
        (application,) = details["applications"].values()
        return [
            Replica(
                pool=pool,
                id=row["replica_id"],
                is_running=row["state"] == "RUNNING",
                front=_process(row.get("pid")),
                engine=_process(engines.get(addresses.get(row.get("actor_id"), ("", 0)))),
            )
            for pool in Pool
            for row in application["deployments"][pool]["replicas"]
        ]

    def healthy(self, pool: Pool) -> list[Replica]:
        """Replicas of a pool that serve, in an order that is always the same."""
        return sorted((one for one in self.replicas() if one.pool is pool and one.is_healthy), key=lambda one: one.id)

    def is_whole(self, pool: Pool) -> bool:
        """Whether the pool has as many healthy replicas as it shall have."""
        return len(self.healthy(pool)) == self.wanted[pool]

    @property
    def num_engines(self) -> int:
        """As there shall be."""
        return sum(self.wanted[pool] for pool in ENGINE_POOLS)

    async def holdings(self) -> Holdings:
        """What each engine holds for requests.

        Raises:
            httpx.HTTPError: the service did not say.
        """
        async with httpx.AsyncClient(timeout=_METRICS_TIMEOUT_S, trust_env=False) as client:
            response = await client.get(f"{self.url}/metrics")
            response.raise_for_status()
        found: Holdings = {}
        for name, pool, replica, value in _GAUGE.findall(response.text):
            if name in HELD:
                found.setdefault((pool, replica), {})[name] = float(value)
        return found

    async def settle(self, timeout_s: float) -> Holdings:
        """Wait until every engine says that it holds nothing, or for so long; what they said last."""
        deadline_s, holdings = time.monotonic() + timeout_s, Holdings()
        while time.monotonic() < deadline_s:
            with suppress(httpx.HTTPError):
                holdings = await self.holdings()
                if len(holdings) == self.num_engines and not any(map(any, (one.values() for one in holdings.values()))):
                    break
            await asyncio.sleep(_POLL_S)
        return holdings


def live_actors() -> list[dict[str, Any]]:
    """Ray's table of actors, of the Ray that this process is connected to, without the dead."""
    return [actor for actor in ray_state.actors().values() if actor["State"] == "ALIVE"]


def _owner(actor: dict[str, Any]) -> tuple[str, int]:
    return _address(actor["OwnerAddress"])


def _address(address: dict[str, Any]) -> tuple[str, int]:
    return address["IPAddress"], address["Port"]


def write_wanted(path: Path, wanted: dict[Pool, int]) -> None:
    """Write how many replicas the pools of engines shall have, so that a reader finds the old or the new."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({pool: wanted[pool] for pool in ENGINE_POOLS}))
    draft.replace(path)


@contextmanager
def serving(folder: RunFolder, port: int, model: str, wanted: dict[Pool, int], pairs: list[str]) -> Iterator[Cluster]:
    """Bring the service up and connect to its Ray; take it down again whatever happens.

    Args:
        folder: for its log and state.
        port: of its API.
        model: its name in the API.
        wanted: replicas of each pool, to begin with; one more of each pool of engines finds room.
        pairs: further arguments of the application.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    replicas_file = (folder.path / "replicas.json").resolve()
    write_wanted(replicas_file, wanted)
    os.environ[scaling.VARIABLE] = str(replicas_file)
    pairs = [f"served_model_name={model}", *_replica_pairs(wanted), *pairs]
    up(folder, f"{scaling.__name__}:graph", port, None, START_TIMEOUT_S, pairs)
    try:
        server = folder.server()
        assert server is not None, "it answered a moment ago"
        join(server)
        yield Cluster(server, model, dict(wanted), replicas_file)
    finally:
        ray.shutdown()
        down(folder)


def join(server: Server) -> None:
    """Connect this process to the server's Ray."""
    # A Ray that a program starts asks for the user's token; to join one, the program has to turn that on itself.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    # That Ray listens on loopback alone (`app/local.py`). Without this Ray 2.60 would look for it at the machine's own
    # address, whatever it is told.
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(address=_gcs_address(server), log_to_driver=False, logging_level=logging.ERROR)


def _gcs_address(server: Server) -> str:
    """Of the server's own Ray, which is written down nowhere but in the arguments of its raylet."""
    (raylet,) = (process for process in server.processes() if process.name() == "raylet")
    arguments: list[str] = raylet.cmdline()
    (address,) = (argument for argument in arguments if argument.startswith(_GCS_ARGUMENT))
    return address.removeprefix(_GCS_ARGUMENT)


def _replica_pairs(wanted: dict[Pool, int]) -> Iterator[str]:
    for pool, count in wanted.items():
        name = pool.lower()
        yield f"{name}.min_replicas={1 if pool in ENGINE_POOLS else count}"
        if pool in ENGINE_POOLS:
            yield f"{name}.initial_replicas={count}"
        yield f"{name}.max_replicas={count + 1 if pool in ENGINE_POOLS else count}"
