"""One background process and all that descends from it: found again later, and stopped whole.

Owns the rule of what belongs to a server (its session) and the folder that remembers it. Does not know what the process
does. `app/local.py` is its caller.
"""

import contextlib
import json
import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, flock
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from app.ports import HOST

_STOP_TIMEOUT_S = 30.0
# To find the processes alone takes more than a second where a machine is busy.
_KILL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """The background process, as remembered between commands.

    Attributes:
        pid: of the process; also the id of its session.
        create_time: tells it from a later process of the same pid.
        port: of the API on 127.0.0.1.
        temp_dir: Ray's files; removed with the server.
    """

    pid: int
    create_time: float
    port: int
    temp_dir: str

    @property
    def url(self) -> str:
        """Address of the API."""
        return f"http://{HOST}:{self.port}"

    def processes(self) -> list[psutil.Process]:
        """Return the live processes of the server's session, the server itself among them while it lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            # A session's id is not given away while it has members: a stranger under it means that ours is gone.
            if abs(psutil.Process(self.pid).create_time() - self.create_time) > 1:
                return []
        return [process for process in psutil.process_iter() if _in_session(process, self.pid)]

    def is_healthy(self) -> bool:
        """Ask the application itself; False while it starts."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:  # refused, reset, timed out, or a status of 400 and above
            return False

    def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """End every process of the session: the server by its own order, then by force whatever is left.

        Args:
            timeout_s: of its own order.
        """
        for process in self.processes():
            if process.pid == self.pid:
                process.terminate()
                psutil.wait_procs([process], timeout=timeout_s)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        # Again and again: Ray's raylet starts workers until it is gone itself.
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def _in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False


def interrupt_once() -> None:
    """Have SIGINT or SIGTERM raise KeyboardInterrupt, the first of them: another does not disturb what is then stopped.

    make passes SIGTERM on to what `timeout` or a shell has sent it already, and people press Ctrl-C twice.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGINT is in the background of a script
            signal.signal(number, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def whole_lines(log: TextIO) -> Iterator[str]:
    """New lines of a log; one that is still being written is left for the next time."""
    at = log.tell()
    while (line := log.readline()).endswith("\n"):
        yield line
        at = log.tell()
    log.seek(at)


# That `make stop` knows.
RUN_FOLDER = Path(".run")


class RunFolder:
    """The folder that remembers the server between commands: its log, and who it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "server.log"
        self._state = path / "server.json"

    @property
    def stop(self) -> str:
        """What a user types to stop the server."""
        return "make stop" if self.path == RUN_FOLDER else f"python -m app.local --run-dir {self.path} down"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from starting or forgetting a server meanwhile."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as lock:
            flock(lock, LOCK_EX)
            yield

    def set_log_aside(self) -> None:
        """Keep the log of a start that failed beside that of the next."""
        self.log.replace(self.log.with_suffix(".log.1"))

    def remember(self, server: Server) -> None:
        """Write the server down."""
        self._state.write_text(json.dumps(asdict(server)))

    def server(self) -> Server | None:
        """Return the server, if any process of it lives."""
        with contextlib.suppress(FileNotFoundError):
            server = Server(**json.loads(self._state.read_text()))
            return server if server.processes() else None
        return None

    def forget(self) -> None:
        """Remember no server."""
        self._state.unlink(missing_ok=True)
