"""A folder and a port for a background server, and a process of somebody else."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.local_process import RunFolder


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "run")
    yield folder
    if (left := folder.server()) is not None:
        left.stop()


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """A process of somebody else that has a Ray process's name."""
    with subprocess.Popen(["bash", "-c", "exec -a ray::Idle sleep 300"], start_new_session=True) as process:
        yield psutil.Process(process.pid)
        process.kill()
