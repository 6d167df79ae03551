"""A cluster on this machine, of a head and two types of nodes that Ray's autoscaler starts and stops.

All of it but the nodes is what a cluster of machines has: Ray's autoscaler looks at what replicas wait for, starts
nodes of the type that has it, and stops those that are idle. A node here is a raylet with a GPU by name. Nobody else's
Ray is touched or found, and everything ends with the bench.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from app.local import SERVE_SETTINGS, read_settings
from app.local_checks import TEMP_PREFIX
from app.local_process import Server
from app.ports import HOST, free_ports
from tests.bench.autoscale.nodes import Nodes

ROOT = Path(__file__).parents[3]
POOLS = ("prefill", "decode")
_HEAD = "ray.head.default"  # as Ray's fake nodes call it
# Which nodes that are machines would run.
_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
_OF_FAKE_NODES = "use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"
_START_TIMEOUT_S = 180.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class NodeTypes:
    """Both types, each with room for one engine of its pool and for no other.

    Attributes:
        max_nodes: of each type.
        idle_s: after which a node is stopped.
    """

    max_nodes: int
    idle_s: float

    def resources(self, pool: str) -> dict[str, float]:
        """Of a node."""
        return {"CPU": 1, "GPU": 1, engine_resource(pool): 1}

    def config(self, gcs_address: str) -> dict[str, Any]:
        """For the autoscaler."""
        types: dict[str, Any] = {
            pool: {
                "resources": self.resources(pool),
                "node_config": {},
                "min_workers": 0,
                "max_workers": self.max_nodes,
            }
            for pool in POOLS
        }
        types[_HEAD] = {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0}
        provider = {"type": "external", "module": f"{Nodes.__module__}.{Nodes.__name__}", "gcs_address": gcs_address}
        return {
            "cluster_name": "bench",
            "max_workers": len(POOLS) * self.max_nodes,
            "upscaling_speed": 10,
            "idle_timeout_minutes": self.idle_s / 60,
            # Ray's fake nodes have one address, and nothing to log in to.
            "provider": provider | dict.fromkeys(_OF_FAKE_NODES, True),
            "available_node_types": types,
            "head_node_type": _HEAD,
            **{key: [] for key in _COMMANDS},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "cluster_synced_files": [],
            "auth": {},
        }


def engine_resource(pool: str) -> str:
    """What a node of a pool's type has, and its engines ask for."""
    return f"{pool}_engine"


@contextmanager
def autoscaling_cluster(types: NodeTypes, log_path: Path) -> Iterator[Path]:
    """Start the head and connect to it; end all that was started whatever happens. Gives the folder of Ray's logs.

    Raises:
        RuntimeError: it did not come up; the log says why.
    """
    temp_dir = tempfile.mkdtemp(prefix=TEMP_PREFIX)
    address = f"{HOST}:{free_ports(1)[0]}"
    config = Path(temp_dir, "autoscaler.json")
    config.write_text(json.dumps(types.config(address)))
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            _head_command(address, config, temp_dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | _environment(),
            cwd=ROOT,
            start_new_session=True,
        )
    server = Server(process.pid, psutil.Process(process.pid).create_time(), 0, temp_dir)
    try:
        _join(address, process, log_path)
        yield Path(temp_dir, "session_latest", "logs")
    finally:
        ray.shutdown()
        server.stop()
        process.wait()


def _head_command(address: str, config: Path, temp_dir: str) -> list[str]:
    _, _, port = address.partition(":")
    command = [sys.executable, "-m", "tests.bench.autoscale.head", "start", "--head", "--block", f"--port={port}"]
    command += [f"--temp-dir={temp_dir}", "--include-dashboard=false", "--disable-usage-stats", "--num-cpus=4"]
    return [*command, "--num-gpus=0", f"--autoscaling-config={config}"]


def _environment() -> dict[str, str]:
    """As of `make serve`, but for HAProxy, of which this is no measurement."""
    return read_settings(SERVE_SETTINGS) | {
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # it listens on loopback alone
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONPATH": str(ROOT),  # for the autoscaler, which loads `nodes.py`
        "PYTHONUNBUFFERED": "1",
    }


def _join(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    host, _, port = address.partition(":")
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    ray_constants.ENABLE_RAY_CLUSTER = False  # see tests/bench/chaos/cluster.py
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        with suppress(OSError, ConnectionError, RuntimeError, ValueError, TimeoutError):
            socket.create_connection((host, int(port)), timeout=1).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        time.sleep(_POLL_S)
    raise RuntimeError(f"Ray's head did not come up; its log: {log_path}")
