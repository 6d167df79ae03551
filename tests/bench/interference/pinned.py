"""A server whose engines have a core each: `python -m tests.bench.interference.pinned up|down [KEY=VALUE ...]`.

Starts what `make serve` starts, then pins each of the two engines, with all threads of its process, to a core of its
own. All else of the server runs where it may, on both sides alike.
"""

import argparse
import os
import sys
from pathlib import Path

import psutil

from app.local import down, up
from app.local_process import RunFolder, Server

PORT = 8011
FOLDER = Path(".run/interference")


def engines(server: Server) -> list[psutil.Process]:
    """The engines' processes, the oldest first."""
    found = [process for process in server.processes() if _is_engine(process)]
    return sorted(found, key=lambda process: process.create_time())


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "EngineActor" in " ".join(process.cmdline()) + process.name()
    except psutil.NoSuchProcess:
        return False  # one that Ray started in advance and needs no more


def pin(process: psutil.Process, core: int) -> None:
    """Keep every thread of a process on one core; later threads inherit it."""
    for thread in process.threads():
        os.sched_setaffinity(thread.id, {core})


def main() -> int:
    """Start and pin, or stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("up", "down"))
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    folder = RunFolder(FOLDER)
    if options.command == "down":
        down(folder)
        return 0
    up(folder, "app:graph", PORT, None, 600, options.arguments)
    server = folder.server()
    assert server is not None
    processes, cores = engines(server), sorted(os.sched_getaffinity(0))
    if len(processes) != 2 or len(cores) < 2:
        print(f"{len(processes)} engines and {len(cores)} cores: two of each are needed", file=sys.stderr)
        return 1
    for process, core in zip(processes, cores, strict=False):
        pin(process, core)
        print(f"engine {process.pid} runs on core {core}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
