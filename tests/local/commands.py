"""Runs `app.local` as `make` does, with a folder of its own."""

import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import psutil

from app.local import main
from app.local_process import RunFolder

ROOT = Path(__file__).parents[2]


def command(folder: RunFolder, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "app.local", "--run-dir", str(folder.path), *arguments]


def run(folder: RunFolder, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def call(folder: RunFolder, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `run` gives, without two seconds of imports: in this process, whose signals are as before."""
    _, _, *words = command(folder, *arguments)
    output, errors = StringIO(), StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status: object
    try:
        with (
            patch.object(sys, "argv", words),
            patch.dict(os.environ, environment),
            redirect_stdout(output),
            redirect_stderr(errors),
        ):
            status = main()
    except SystemExit as end:
        status = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(status, int)
    return subprocess.CompletedProcess(words, status, output.getvalue(), errors.getvalue())


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
