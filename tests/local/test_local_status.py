"""`python -m app.local status`: what a service does, in a terminal; and why it cannot be told."""

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.local_process import RunFolder
from app.local_status import KEY_VARIABLE
from deployments.api import sse
from deployments.load.reading import DECODE, PREFILL
from deployments.planner.shared import Decision
from deployments.telemetry.live import ServiceState, describe
from tests.local.commands import ROOT, call
from tests.telemetry.minutes import Service

KEY = "sk-watcher-0123456789"


def document() -> bytes:
    """Of a service that has worked for a minute, with a replica that is silent and one that is gone."""
    service = Service()
    prefill, _ = service.start(PREFILL, "p1"), service.start(DECODE, "d1")
    service.start(DECODE, "d2")

    def work() -> None:
        prefill.prompt_tokens += 12_345
        prefill.num_running = 3
        service.clients.first_token(0.3)

    service.run(60, work)
    del service.engines[DECODE]["d2"]
    service.silent_s["d1"] = 12.0
    service.refusals["ttft", "low"] += 4
    service.run(5, work)
    decision = Decision(1.0, {"decode": 1}, {"decode": 2}, "tokens come too late", False)
    state = ServiceState("model-x", "disaggregated", "1.2", (True, ""), is_planned=True, decisions=[decision])
    return sse.to_json(describe(state, service.history, (), service.now_s))


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[str]:
    """Somebody who answers so at every path, to whoever has the key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            has_key = self.headers["authorization"] in (None, f"Bearer {KEY}")
            self.send_response(status if has_key else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # by itself it ends in 0.5 s
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def status(
    *arguments: str, key: str = "", folder: Path = ROOT / "nowhere", columns: int = 120
) -> subprocess.CompletedProcess[str]:
    environment = {"COLUMNS": str(columns)} | ({KEY_VARIABLE: key} if key else {})
    return call(RunFolder(folder), "status", *arguments, **environment)


def test_what_a_service_does_is_told_in_words_and_numbers() -> None:
    with answering(document()) as url:
        told = status("--url", url, key=KEY)
    assert told.returncode == 0, told.stderr
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    assert lines[0] == "model-x disaggregated, kvrelay 1.2 serving"
    assert any(line.startswith("time to first token") and line.endswith(" 65") for line in lines), told.stdout
    assert "p1 busy 0 3 of 4 0% 12.3k" in lines
    assert "d2 gone 4 s ago" in lines
    assert any(line.startswith("d1 silent for 12 s") for line in lines)
    assert "refused: 4 (ttft, low priority)" in lines
    assert any(line.startswith("planner, ") and line.endswith("decode 2. tokens come too late") for line in lines)


def test_a_service_that_sleeps_is_said_to_serve_and_to_have_nobody_yet() -> None:
    shown = json.loads(document())
    shown["health"] = {"status": "ok", "reason": "no decode replica runs, the next request starts one"}
    with answering(json.dumps(shown).encode()) as url:
        told = status("--url", url, key=KEY)
    (line, *_) = told.stdout.splitlines()
    assert line.split("  ")[-1].strip() == "serving: no decode replica runs, the next request starts one"


def test_what_became_of_replicas_is_told() -> None:
    shown = json.loads(document())
    kinds = {"came": "serves", "gone": "is gone", "flipped": "flipped to this pool"}
    shown["events"] = [{"at_s": 1.0, "pool": "prefill", "replica": f"r-{kind}", "kind": kind} for kind in kinds]
    with answering(json.dumps(shown).encode()) as url:
        told = status("--url", url, key=KEY)
    for kind, words in kinds.items():
        assert f"prefill replica r-{kind} {words}\n" in told.stdout


def test_nothing_is_cut_off_in_a_pipe_of_80_columns() -> None:
    shown = json.loads(document())
    shown["pools"]["decode"]["states"] = {"RUNNING": 12, "STARTING": 3, "STOPPING": 2}
    for pool in shown["pools"].values():
        for replica in pool["replicas"]:
            replica |= {"name": "[b]1u1m]", "max_running": 1024, "since_s": 1234.0}
    with answering(json.dumps(shown).encode()) as url:
        told = status("--url", url, key=KEY, columns=80)
    words = " ".join(told.stdout.split())
    assert "…" not in told.stdout
    assert "[b]1u1m] busy 0 3 of 1024 0% 12.3k" in words and "[b]1u1m] gone 1234 s ago" in words
    assert all(state in words for state in ("12 running", "3 starting", "2 stopping"))


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b"{}", 401, f"set {KEY_VARIABLE} to a key with metrics = true"),
        (b"<html>", 200, "is no JSON"),
        (json.dumps({"model": "m"}).encode(), 200, "is not of kvrelay"),
        (b"{}", 500, "answers 500"),
    ],
)
def test_who_asks_in_vain_is_told_why(body: bytes, code: int, said: str) -> None:
    with answering(body, code) as url:
        told = status("--url", url)
    assert (told.returncode, told.stdout) == (1, "")
    assert said in told.stderr and "Traceback" not in told.stderr


@pytest.mark.parametrize("key", ["sk-secret\nrest", "sk-secret\u2013rest", "sk-secret\u200brest"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    told = status("--url", "http://127.0.0.1:9", key=key)
    assert (told.returncode, told.stdout) == (1, "")
    assert f"{KEY_VARIABLE} has a character that no header can carry" in told.stderr
    assert told.stderr.count("\n") == 1 and "secret" not in told.stderr and "rest" not in told.stderr


def test_a_line_break_after_the_key_is_none_of_it() -> None:
    with answering(document()) as url:
        assert status("--url", url, key=f"{KEY}\n").returncode == 0


def test_where_nothing_is_served_that_is_said(port: int, folder: RunFolder) -> None:
    told = status("--url", f"http://127.0.0.1:{port}")
    assert (told.returncode, "nothing answers at" in told.stderr) == (1, True)
    told = status(folder=folder.path)
    assert (told.returncode, "no server runs; start one: make serve" in told.stderr) == (1, True)


def test_watching_shows_it_again_until_it_is_ended() -> None:
    with answering(document()) as url:
        command = [sys.executable, "-m", "app.local", "status", "--watch", "--url", url]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(2):
                while not process.stdout.readline().startswith("model-x"):
                    assert process.poll() is None
            process.terminate()
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_terminal_with_fewer_lines_than_there_are_replicas_shows_what_the_planner_decided() -> None:
    shown = json.loads(document())
    (replica, *_) = shown["pools"]["prefill"]["replicas"]
    shown["pools"]["prefill"]["replicas"] = [replica | {"name": f"r{n}"} for n in range(40)]
    screen, end = pty.openpty()
    environment = os.environ | {"LINES": "24", "COLUMNS": "100", "TERM": "xterm"}
    with answering(json.dumps(shown).encode()) as url:
        command = [sys.executable, "-m", "app.local", "status", "--watch", "--url", url]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=end, stderr=end) as process:
            os.close(end)
            told = b""
            try:
                while b"r0" not in told:
                    told += os.read(screen, 65536)  # which may end within a character
            finally:
                process.terminate()
            with suppress(OSError):  # of a terminal that nobody has any more; who writes there waits for a reader
                while os.read(screen, 65536):
                    pass
    os.close(screen)
    assert b"decode 2. tokens come too late" in told and b"r39" not in told
