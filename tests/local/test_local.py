"""What of the background server needs no Ray: refusals, and which processes are its own."""

import os
import re
import socket
import subprocess
import sys

import psutil
import pytest
from ray.serve._private import constants

from app.local import serve_environment, up
from app.local_checks import LocalError
from app.local_process import Server
from tests.local.commands import ROOT, call, is_alive
from tests.waiting import wait_until


def session(leader: subprocess.Popen[bytes]) -> Server:
    return Server(leader.pid, psutil.Process(leader.pid).create_time(), 0, "/nonexistent")


def test_a_taken_port_is_refused_before_anything_starts(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LocalError, match=f"port {port} cannot be listened on"):
            up(folder, "tests.tiny_graphs:healthy", port, None, 60, [])
    assert not folder.log.exists()


def test_two_servers_of_one_machine_share_no_port_that_is_fixed_otherwise(tmp_path):
    one, other = (serve_environment(str(tmp_path / name)) for name in ("one", "other"))
    fixed = {name for name in vars(constants) if re.fullmatch("RAY_SERVE_(HAPROXY|FALLBACK_PROXY)_.*_PORT", name)}
    assert len(fixed) == 4
    assert [name for name in fixed if one[name] == other[name]] == []


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_there_is_none_of_is_refused_with_the_bounds(folder, port):
    with pytest.raises(LocalError, match=f"^port {port}: must be from 1 to 65535$"):
        up(folder, "tests.tiny_graphs:healthy", port, None, 60, [])
    assert not folder.log.exists()


@pytest.mark.parametrize("option", ["--num-cpus=0", "--num-cpus=-3", "--timeout=nan", "--timeout=0"])
def test_an_option_out_of_bounds_is_refused_by_name(folder, port, option):
    refused = call(folder, "up", "--port", str(port), "--app", "tests.tiny_graphs:healthy", option)
    name, _, value = option.partition("=")
    assert refused.returncode == 2
    assert f"argument {name}: {value} must be more than 0" in refused.stderr
    assert not folder.log.exists()


@pytest.mark.parametrize(
    ("pair", "message"), [("mode=fast", "'disaggregated' or 'colocated'"), ("mode", "'mode' is not of the form")]
)
def test_a_wrong_argument_is_refused_before_anything_starts(folder, port, pair, message):
    refused = call(folder, "up", "--port", str(port), pair)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not folder.log.exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [("/no/such/folder", "model '/no/such/folder': no such folder"), ("a b/c d", "nor a hub id (OWNER/NAME)")],
)
def test_a_model_that_is_not_there_is_refused_in_one_line_before_anything_starts(folder, port, model, message):
    refused = call(folder, "up", "--port", str(port), f"model={model}")
    assert refused.returncode == 1
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not folder.log.exists()


def test_api_keys_that_cannot_be_read_are_refused_before_anything_starts(folder, port, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text("[alice]\nkey = 'too short'\n")
    refused = call(folder, "up", "--port", str(port), f"ingress.api_keys={keys}")
    assert refused.returncode == 1
    assert f"API keys in {keys}: [alice] key: a key is 16 to" in refused.stderr
    assert "too short" not in refused.stderr
    assert not folder.log.exists()


def test_make_serve_hands_on_a_model_whose_path_has_what_shells_and_make_would_read(tmp_path):
    echo = tmp_path / "python"
    echo.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    echo.chmod(0o755)
    model = """/a b/it's a "model", small; $HOME/$(shell echo x)/100% \\#1"""
    installed = [f"--assume-old={path}" for path in (".venv/.stamp-runtime", ".venv/bin/python")]
    made = subprocess.run(
        ["make", *installed, "serve", f"PY={echo}", f"MODEL={model}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert made.stdout.splitlines() == ["-m", "app.local", "up", "--port", "8000", f"model={model}"]


def test_a_process_that_ignores_the_order_to_stop_is_ended_by_force():
    stubborn = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stopped = psutil.Process(process.pid)
        session(process).stop(timeout_s=0)
        assert not is_alive(stopped)


def test_children_that_outlive_the_server_are_found_and_stopped():
    with subprocess.Popen(["bash", "-c", "sleep 300 & read"], stdin=subprocess.PIPE, start_new_session=True) as leader:
        server = session(leader)
        (orphan,) = wait_until(lambda: [one for one in server.processes() if one.pid != server.pid])
        leader.kill()
        leader.wait()
        assert server.processes() == [orphan]
        server.stop(timeout_s=5)
        assert not is_alive(orphan)


def test_a_stranger_that_got_the_servers_pid_is_not_touched(bystander):
    assert os.getsid(bystander.pid) == bystander.pid
    server = Server(bystander.pid, bystander.create_time() - 100, 0, "/nonexistent")
    assert server.processes() == []
    server.stop(timeout_s=0.5)
    assert bystander.is_running()
