"""Which process is whose, of a service on this machine."""

import re
from contextlib import suppress
from pathlib import Path

import psutil


def title_of(process: psutil.Process) -> str:
    """What it calls itself; nothing once it has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()[:1])
    return ""


def engine_of(front: psutil.Process) -> psutil.Process:
    """The engine of a replica, whose front keeps a descriptor of that process."""
    pids = set()
    for path in Path(f"/proc/{front.pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed since
            pids |= {int(pid) for pid in re.findall(r"^Pid:\s+(\d+)$", path.read_text(), re.MULTILINE)}
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    (engine,) = [process for process in processes if "EngineActor" in title_of(process)]
    return engine
