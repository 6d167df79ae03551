"""Ports of this machine: whether one can be had, and some that nobody has."""

import contextlib
import secrets
import socket
from pathlib import Path

HOST = "127.0.0.1"
MAX_PORT = 65535
# Ray's workers have those before.
_LEAST = 20_000
_MOST_TRIES = 100
_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")


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
    """Different ones, until somebody takes them by their number.

    The system gives them to nobody who asks for any, where there are such: a raylet asks so for its own ports while
    those of its agents, which it is told, are not taken yet.
    """
    left, ports = _not_given(_GIVEN), list[int]()
    with contextlib.ExitStack() as stack:
        for number in range(_MOST_TRIES + count):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # somebody has it
                probe.bind((HOST, secrets.choice(left) if left and number < _MOST_TRIES else 0))
                ports.append(probe.getsockname()[1])
            if len(ports) == count:
                break
    return ports


def _not_given(path: Path) -> range:
    """Ports that the system gives to nobody by itself; none where it does not say."""
    try:
        return range(_LEAST, int(path.read_text().split()[0]))
    except (OSError, ValueError, IndexError):
        return range(0)
