"""Keeps the servers that Ray Serve starts in its replicas to this machine; for a Ray of one machine.

Runs in every worker process of such a Ray before anything else, so it imports nothing that is slow. Named by
`local_server.py`.
"""

from collections.abc import Callable
from typing import Any

from ray._common import tls_utils

_EVERYWHERE = "[::]:"


def bind_replicas_to_loopback() -> None:
    """Have the gRPC servers between replicas listen on 127.0.0.1, where Ray Serve says "[::]" (2.60, replica.py).

    Whoever reaches one of them can run code in the replica, and no setting of Serve's keeps it from other machines.
    """
    add_port: Callable[[Any, str], Any] = tls_utils.add_port_to_grpc_server

    def add_local_port(server: Any, address: str) -> Any:
        return add_port(server, address.replace(_EVERYWHERE, "127.0.0.1:"))

    tls_utils.add_port_to_grpc_server = add_local_port
