"""`serve run app:graph` in a terminal: a line for each call, silence while nobody calls, and Ctrl-C ends it."""

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from app.local_process import Server
from app.ports import free_ports
from tests.e2e.conftest import MODEL_NAME, save_small_model
from tests.waiting import wait_until

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 120.0
# In which a service that told of what it asks itself would have written 40 lines.
IDLE_S = 20.0
NUM_CALLS = 3
# `serve run`, which has no option for the port.
PROGRAM = """
import sys
from ray.serve.config import HTTPOptions
HTTPOptions.model_fields["port"].default = int(sys.argv.pop(1))
HTTPOptions.model_rebuild(force=True)
from ray.serve.scripts import cli
cli(prog_name="serve")
"""
ARGUMENTS = [f"served_model_name={MODEL_NAME}", "min_remote_prefill_tokens=64", "parity_check=False"]
ARGUMENTS += ["engine.num_blocks=500", "engine.block_size=16", "ingress.max_ttft_s=600"]
# Red, as terminals have it, or what is written in it.
BAD = re.compile(r"\x1b\[(?:\d+;)*(?:31|91)m|Traceback|\bERROR\b")


class Terminal:
    """A program in a terminal of its own, and all that it has written there."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._keyboard, end = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            # Tests that run in the background of a script are born with the signal ignored, and so are their children.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            command,
            stdin=end,
            stdout=end,
            stderr=end,
            env=environment,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(end)
        self.shown = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # of a terminal that nobody has any more
            while piece := os.read(self._keyboard, 65536):
                self.shown += piece.decode(errors="replace")

    def press_ctrl_c(self) -> None:
        os.write(self._keyboard, b"\x03")

    def close(self) -> None:
        """Once all who write to it have ended."""
        self._reader.join()
        os.close(self._keyboard)


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def terminal(tmp_path: Path, port: int) -> Iterator[Terminal]:
    model = save_small_model(tmp_path / "model")
    # Short, for Ray puts sockets there; and its own, or it would join a Ray of others.
    folder = tempfile.mkdtemp(prefix="kvrelay-")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", PROGRAM, str(port), "run", "app:graph", f"model={model}", *ARGUMENTS]
    terminal = Terminal(command, environment | {"RAY_TMPDIR": folder, "TERM": "xterm"})
    server = Server(terminal.process.pid, psutil.Process(terminal.process.pid).create_time(), port, folder)
    yield terminal
    server.stop(timeout_s=1.0)
    terminal.process.wait()
    terminal.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_it_tells_of_calls_is_silent_while_nobody_calls_and_ends_by_ctrl_c_without_an_error(
    terminal: Terminal, port: int
) -> None:
    url = f"http://127.0.0.1:{port}"

    def is_healthy() -> bool:
        assert terminal.process.poll() is None, terminal.shown
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/health", timeout=5).is_success
        return False

    wait_until(lambda: is_healthy() and "is ready at" in terminal.shown, START_TIMEOUT_S, lambda: terminal.shown)
    for number in range(NUM_CALLS):
        body = {
            "model": MODEL_NAME,
            "prompt": [1 + (number + n) % 250 for n in range(40 + 60 * number)],
            "max_tokens": 4,
        }
        httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()
    wait_until(
        lambda: len(re.findall(r"call=\S+ path=/v1/completions status=200 outcome=ok", terminal.shown)) == NUM_CALLS
    )
    told = terminal.shown
    time.sleep(IDLE_S)
    assert terminal.shown == told, terminal.shown.removeprefix(told)

    terminal.press_ctrl_c()
    wait_until(lambda: terminal.process.poll() is not None, STOP_TIMEOUT_S, lambda: terminal.shown)
    assert terminal.process.returncode == 0
    assert "deployment='Decode', app='default') is stopped" in terminal.shown
    assert BAD.findall(terminal.shown) == [], terminal.shown
