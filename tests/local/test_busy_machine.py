"""Ray that does not come up: nothing of it is left, it is tried once more, and then said in one line."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import RayTaskError

from app import local_server
from app.config import AppConfig
from app.local_process import RunFolder
from app.local_server import NO_RAY, NO_RAY_MARK, RUNS, STAGE_MARK
from tests.local.commands import ROOT, is_alive
from tests.waiting import wait_until

REASON = "The current node timed out during startup."
# In the place of a server: leaves a child that listens, as a Ray that half came up does, until the file says otherwise.
FAKE = f"""#!{sys.executable}
import os, sys, http.server, pathlib, socket, subprocess, time
folder = pathlib.Path(sys.argv[0]).parent
num_starts = len(list(folder.glob("start-*")))
(folder / f"start-{{num_starts}}").touch()
if num_starts < int((folder / "num_failures").read_text()):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        child = subprocess.Popen(["sleep", "300"], close_fds=False)
        (folder / f"child-{{num_starts}}").write_text(str(child.pid))
        print("{STAGE_MARK}{NO_RAY_MARK}: {REASON}", flush=True)
        os._exit({NO_RAY})
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy)
print("{STAGE_MARK}{RUNS}", flush=True)
server.serve_forever()
"""


Up = Callable[[int], subprocess.CompletedProcess[str]]


@pytest.fixture
def up(tmp_path: Path, folder: RunFolder, port: int) -> Up:
    """Runs the command with the fake for a server, of which the first few starts fail."""
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    # The command starts its own Python again.
    code = "import sys, app.local; sys.executable = sys.argv.pop(1); sys.exit(app.local.main())"
    command = [sys.executable, "-c", code, str(fake), "--run-dir", str(folder.path), "up", "--port", str(port)]

    def up(num_failures: int) -> subprocess.CompletedProcess[str]:
        (tmp_path / "num_failures").write_text(str(num_failures))
        app = ["--app", "tests.tiny_graphs:healthy"]
        return subprocess.run([*command, *app], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    return up


def assert_started_twice_and_nothing_is_left_of_failures(folder: Path) -> None:
    assert len(list(folder.glob("start-*"))) == 2
    for path in folder.glob("child-*"):
        with suppress(psutil.NoSuchProcess):
            assert not is_alive(psutil.Process(int(path.read_text()))), "something listens still"


def test_a_ray_that_comes_up_the_second_time_serves(up: Up, tmp_path: Path, folder: RunFolder) -> None:
    started = up(1)
    assert started.returncode == 0, started.stderr
    assert f"{NO_RAY_MARK}: {REASON}; trying once more" in started.stdout
    assert REASON in folder.log.with_suffix(".log.1").read_text()
    server = folder.server()
    assert server is not None and server.is_healthy()
    assert_started_twice_and_nothing_is_left_of_failures(tmp_path)


def test_a_ray_that_never_comes_up_is_told_in_one_line_with_advice_and_leaves_nothing(
    up: Up, tmp_path: Path, folder: RunFolder
) -> None:
    failed = up(9)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"{NO_RAY_MARK}: {REASON}, twice; the load of this machine is ")
    assert f"try again when it has less to do (the log: {folder.log})" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert folder.server() is None
    assert_started_twice_and_nothing_is_left_of_failures(tmp_path)


LINES = "HTTP proxies not\navailable after 60s."
MISSING = FileNotFoundError("no kvrelay-haproxy in PATH")
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in ready\n'


LATE = TimeoutError(LINES), " ".join(LINES.split())
ELSEWHERE = RayTaskError("ready", TRACEBACK * 9 + str(MISSING), MISSING), str(MISSING)


@pytest.mark.parametrize(
    ("fails", "error", "said"),
    [("ray.init", *LATE), ("serve.start", *LATE), ("serve.start", *ELSEWHERE), ("serve.run", *LATE)],
    ids=["Ray", "Serve", "Serve's proxy", "replicas"],
)
def test_a_server_whose_ray_does_not_come_up_says_so_in_one_line_and_ends_with_its_status(
    fails: str, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    def end(status: int) -> None:
        raise SystemExit(status)

    for name in ("ray.init", "serve.start", "serve.run"):
        module, function = name.split(".")
        monkeypatch.setattr(getattr(local_server, module), function, fail if name == fails else lambda *a, **k: None)
    monkeypatch.setattr(local_server, "choose_ports", lambda: None)
    monkeypatch.setattr(local_server, "load_builder", lambda path: lambda config: AppConfig)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["server", "--app", "a:b", "--port", "1", "--num-cpus", "1", "--temp-dir", "/x"])
    with pytest.raises(SystemExit) as ended:
        local_server.main()
    assert ended.value.code == NO_RAY
    assert f"{STAGE_MARK}{NO_RAY_MARK}: {said}\n" in capsys.readouterr().out


def test_who_waits_for_replicas_is_told_again_how_it_stands(monkeypatch, capsys):
    deployment = SimpleNamespace(replica_states={"STARTING": 1})
    status = SimpleNamespace(applications={"default": SimpleNamespace(deployments={"Decode": deployment})})
    monkeypatch.setattr(serve, "status", lambda: status)
    monkeypatch.setattr(local_server, "_POLL_S", 0.01)
    monkeypatch.setattr(local_server, "_PATIENCE_S", 0.0)
    told: list[str] = []

    def told_so_far() -> list[str]:
        told.extend(capsys.readouterr().out.splitlines())
        return told

    stopped = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        reporting = thread.submit(local_server._report_replicas, stopped)
        try:
            wait_until(lambda: len(told_so_far()) >= 3, 30)
        finally:
            stopped.set()
        reporting.result()
    assert told[:3] == [f"{STAGE_MARK}{line}" for line in ("Decode: 1 starting", *["still so: Decode: 1 starting"] * 2)]
