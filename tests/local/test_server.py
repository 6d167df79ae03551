"""The background server comes up, says why when it does not, and goes away whole and alone. Starts Ray."""

import json
import re
import signal
import subprocess
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from app.local_process import RunFolder, Server
from tests.local.commands import ROOT, call, command, is_alive, run
from tests.waiting import wait_until

# A start of Ray's on a machine that others keep busy, and once more where it does not come up.
pytestmark = pytest.mark.timeout(900)


def remembered(folder: RunFolder) -> Server:
    server = folder.server()
    assert server is not None
    return server


def title_of(process: psutil.Process) -> str:
    """What it calls itself; nothing once it has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()[:1])
    return ""


@pytest.mark.e2e
def test_a_server_comes_up_answers_and_goes_away_whole_and_alone(folder, port, bystander):
    started = run(folder, "up", "--app", "tests.tiny_graphs:healthy", "--port", str(port), "model=some/model")
    assert started.returncode == 0, started.stderr
    assert "converting the model (the first time only)" in started.stdout
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in started.stdout
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
        assert json.load(response) == {"model": "some/model"}

    server = remembered(folder)
    members = server.processes()
    assert len(members) > 3
    # The name of Ray's workers that are not, or not yet, actors: here nothing is to come for them.
    assert [process for process in members if "ray::IDLE" in title_of(process)] == []
    # It waits five seconds for the answer, which on a busy machine may be too few.
    wait_until(lambda: f"at {server.url} answers" in run(folder, "status").stdout, 120)
    again = call(folder, "up", "--app", "tests.tiny_graphs:healthy", "--port", str(port))
    assert again.returncode == 1
    assert f"already runs at {server.url}" in again.stderr

    assert run(folder, "down").returncode == 0
    log = folder.log.read_text()
    assert re.search(r"Replica\(id='\w+', deployment='\w+', app='default'\) is stopped", log), "in order"
    assert "ServeController.graceful_shutdown" not in log
    assert [process for process in members if is_alive(process)] == []
    assert server.processes() == []
    assert not Path(server.temp_dir).exists()
    assert bystander.is_running()
    assert call(folder, "down").stderr.strip() == "no server runs"
    assert call(folder, "status").returncode == 1


@pytest.mark.e2e
def test_a_graph_that_cannot_start_is_reported_with_its_cause_and_leaves_nothing(folder, port):
    failed = run(folder, "up", "--app", "tests.tiny_graphs:broken", "--port", str(port))
    assert failed.returncode == 1
    assert "ValueError: layer 7 cannot be run" in failed.stderr
    assert folder.server() is None


@pytest.mark.e2e
def test_engines_for_which_nothing_is_here_are_refused_in_one_line_instead_of_waiting(folder, port):
    failed = run(folder, "up", "--port", str(port), "decode.resources.slot=1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == ["decode.resources.slot=1 (engines: 1): 1 slot needed, and Ray finds 0 here"]
    assert folder.server() is None


@pytest.mark.e2e
def test_interrupting_the_start_stops_what_was_started(folder, port):
    arguments = command(folder, "up", "--app", "tests.tiny_graphs:healthy", "--port", str(port))
    # Tests that run in the background of a script are born with the signal ignored, and so are their children.
    heed_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        assert process.stdout is not None
        assert any("starting Ray" in line for line in process.stdout)
        server = remembered(folder)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=240)
        assert process.returncode == 130
    assert server.processes() == []
    assert folder.server() is None
