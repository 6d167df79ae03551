"""Ports of this machine: whether one can be had, and some that nobody has."""

import contextlib
import socket

HOST = "127.0.0.1"
MAX_PORT = 65535


def why_not(port: int) -> str | None:
    """Why a server cannot listen there, in the system's words; None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            return getattr(error, "strerror", None) or str(error)
    return None


def free_ports(count: int) -> list[int]:
    """Different ones, until somebody takes them."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
