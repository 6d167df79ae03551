"""Senders come first: all their threads, and nothing that they start."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import psutil
import pytest

from load_tests.punctual import put_first

PROGRAM = textwrap.dedent(
    """
    import os, subprocess, sys, threading
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    print("up", flush=True)
    sys.stdin.readline()
    child = "import os; print(os.sched_getscheduler(0))"
    print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip(), flush=True)
    """
)


@pytest.fixture
def sender() -> Iterator[subprocess.Popen[str]]:
    command, pipe = [sys.executable, "-c", PROGRAM], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    yield process
    process.kill()
    process.communicate()


def test_threads_come_first_and_children_do_not(sender):
    process = psutil.Process(sender.pid)
    if not put_first(process):
        pytest.skip("real-time classes are not allowed here")
    classes = {os.sched_getscheduler(thread.id) & ~os.SCHED_RESET_ON_FORK for thread in process.threads()}
    assert len(process.threads()) > 1 and classes == {os.SCHED_RR}
    assert sender.communicate("\n")[0] == f"{os.SCHED_OTHER}\n"


def test_a_process_that_is_gone_is_nobodys_fault(sender):
    process = psutil.Process(sender.pid)
    sender.kill()
    sender.wait()
    assert not put_first(process)


def test_a_system_that_forbids_it_is_told_of(sender, monkeypatch):
    def forbidden(*_):
        raise PermissionError("not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    assert not put_first(psutil.Process(sender.pid))
