"""Chooses the ports of Ray's agents before they start, so that Ray comes up on a busy machine too.

A raylet waits 15 s for its agents to say which ports they chose, and then ends itself (Ray 2.60, node_manager.cc); no
setting changes that. The agents import much first, which takes longer at a load of 8 on two cores (2026-11-28). A
raylet that finds the ports where the agents would write them does not wait. Called by `local_server.py`.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ray._private import services

from app.ports import free_ports

_raylet: Any = import_module("ray._raylet")  # its stub lacks these names
# Parameters of Ray's `start_raylet`, and the files in which a raylet looks.
PORTS = {
    "metrics_agent_port": _raylet.METRICS_AGENT_PORT_NAME,
    "metrics_export_port": _raylet.METRICS_EXPORT_PORT_NAME,
    "dashboard_agent_listen_port": _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
    "runtime_env_agent_port": _raylet.RUNTIME_ENV_AGENT_PORT_NAME,
}


def choose_ports() -> None:
    """Have the raylets that this process starts find the ports of their agents chosen."""
    start_raylet: Callable[..., Any] = services.start_raylet
    signature = inspect.signature(start_raylet)

    @functools.wraps(start_raylet)
    def start_with_ports(*args: object, **kwargs: object) -> object:
        call = signature.bind(*args, **kwargs)
        for (parameter, file_name), port in zip(PORTS.items(), free_ports(len(PORTS)), strict=True):
            call.arguments[parameter] = port
            _raylet.persist_port(call.arguments["session_dir"], call.arguments["node_id"], file_name, port)
        return start_raylet(*call.args, **call.kwargs)

    services.start_raylet = start_with_ports
