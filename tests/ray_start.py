"""Starts a Ray for tests on a machine that others keep busy, as `app/local.py` does it for users."""

import gc
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import psutil
import pytest
import ray
from ray._private import services
from ray._private.node import Node

from app.local import SERVE_SETTINGS, read_settings
from app.ray_agents import choose_ports

NUM_STARTS = 3
# Of Ray's `Node`: they start its autoscaler, and what hands on what workers write, which nobody here asks for.
UNUSED = ("start_log_monitor", "start_monitor")
# What the processes of a node have to start.
SETTINGS = ("RAY_gcs_server_port_wait_time_s", "RAY_agent_register_timeout_ms")


def start_ray(**options: Any) -> None:
    """Start one of its own; again where it does not come up, since Ray itself waits for its raylet for 30 s.

    What a start has left that failed is ended. Two of Ray's processes that serve nobody here are left out.
    """
    # Ray drops the processes of a start that failed, which Python finds to run still.
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        patch.setattr(services, "start_raylet", services.start_raylet)  # and as it was afterwards
        for start in UNUSED:
            patch.setattr(Node, start, lambda node, **_: None)
        choose_ports()
        set_as_make_serve(patch, SETTINGS)
        for number in range(NUM_STARTS):
            before = set(psutil.Process().children(recursive=True))
            try:
                ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)
                return
            except Exception:  # Ray has no type of its own for what did not come in time
                if number + 1 == NUM_STARTS:
                    raise
                ray.shutdown()
                end(set(psutil.Process().children(recursive=True)) - before)
            gc.collect()


def set_as_make_serve(patch: pytest.MonkeyPatch, names: Iterable[str]) -> None:
    """Give variables of the environment the values of `app/serve.env`."""
    settings = read_settings(SERVE_SETTINGS)
    for name in names:
        patch.setenv(name, settings[name])


def end(processes: set[psutil.Process]) -> None:
    """By force, and wait for it."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes)
