"""A server under measurement: starts it as `make serve` does, and adds up what its processes use."""

import contextlib
import csv
import io
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from app.local import up
from app.local_process import RunFolder, Server
from tests.bench.serving.paced import TRACE_VARIABLE

# Ray Serve as it comes.
DEFAULT_FLAGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
}
# Names that `make serve`'s processes go by, and what they are called here.
_ROLES = (
    ("HAProxyManager", "proxy actor"),
    ("haproxy", "haproxy"),
    ("ProxyActor", "proxy actor"),
    ("ngress", "ingress"),
    ("EngineActor", "engine"),
    ("ecode", "decode front"),
    ("ServeController", "controller"),
    ("raylet", "raylet"),
    ("gcs_server", "gcs"),
)


class MeasuredServer:
    """One application on a Ray of its own.

    Args:
        folder: for its log, its state and its engine's trace.
        graph: name of the function in `graphs.py`.
        port: of its API.
        flags: settings of Ray Serve that differ from `app/serve.env`.
        arguments: of the graph.
    """

    def __init__(
        self, folder: Path, graph: str, port: int, flags: dict[str, str], arguments: tuple[str, ...] = ()
    ) -> None:
        self.name = graph
        self.port = port
        self.trace = folder / "trace.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = RunFolder(folder)
        with _environment(flags | {TRACE_VARIABLE: str(self.trace)}):
            pairs = ["served_model_name=bench", "mode=colocated", *arguments]
            up(self._folder, f"tests.bench.serving.graphs:{graph}", port, 8, 300, pairs)
        server = self._folder.server()
        assert server is not None
        self.server: Server = server
        if flags.get("RAY_SERVE_ENABLE_HA_PROXY") != "0":
            self._wait_for_haproxy()

    def _wait_for_haproxy(self) -> None:
        """Return when HAProxy knows the ingress replica; until then it sends requests through Serve's own proxy."""
        (address,) = Path(self.server.temp_dir, "h").glob("*/admin.sock")
        while True:
            with socket.socket(socket.AF_UNIX) as admin:
                admin.connect(str(address))
                admin.sendall(b"show stat\n")
                table = admin.makefile().read()
            rows = csv.DictReader(io.StringIO(table.removeprefix("# ")))
            if any(row["svname"].startswith("SERVE_REPLICA") and row["status"].startswith("UP") for row in rows):
                return
            time.sleep(0.2)

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """Every process of the server with its role."""
        found = []
        for process in self.server.processes():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline()[:1]) + " " + process.name()
                role = next((role for mark, role in _ROLES if mark in command), "other")
                found.append((role, process))
        return found

    def cpu_s(self) -> Counter[str]:
        """CPU seconds by role, user and system, since each process began."""
        used: Counter[str] = Counter()
        for role, process in self.processes():
            with contextlib.suppress(OSError):  # ended since
                seconds: Any = time.clock_gettime(_cpu_clock(process.pid))  # a Counter is typed for whole numbers
                used[role] += seconds
        return used

    def rss_bytes(self, role: str) -> int:
        return sum(process.memory_info().rss for name, process in self.processes() if name == role)

    def stop(self) -> None:
        self.server.stop()
        self._folder.forget()


def _cpu_clock(pid: int) -> int:
    """The clock of a process's CPU time, as `clock_getcpuclockid(3)` makes it, which Python lacks.

    In nanoseconds, where `/proc` counts ticks of 10 ms.
    """
    return (~pid << 3) | 2


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
