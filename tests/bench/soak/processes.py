"""What each process of a service uses: memory, threads, file descriptors. Reads `/proc`, asks nobody."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# Titles and names that processes go by, and what they are called here; the first that fits.
_ROLES = (
    ("EngineActor", "engine"),
    (":Prefill", "prefill front"),
    (":Decode", "decode front"),
    (":Ingress", "ingress"),
    ("ServeController", "controller"),
    ("HAProxyManager", "proxy actor"),
    ("ProxyActor", "proxy actor"),
    ("haproxy", "haproxy"),
    ("raylet", "raylet"),
    ("gcs_server", "gcs"),
    ("ray::", "worker"),
)
# What a worker of Ray's runs until it has a title, which takes it seconds on a busy machine.
_STARTS_OF_WORKERS = ("setup_worker", "default_worker")
_ARENA = "/memfd:kvrelay"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process uses at one time.

    Attributes:
        pid: of the process.
        role: what it is for.
        at_s: when, by the system's monotonic clock.
        rss_bytes: memory that it has mapped and touched, shared memory included.
        uss_bytes: of that, what nobody shares.
        arena_bytes: what it has written of the memory from which other engines read its KV; its size is fixed.
        arena_size: that size; 0: it has none.
        num_threads: its threads.
        num_fds: its open file descriptors.
    """

    pid: int
    role: str
    at_s: float
    rss_bytes: int
    uss_bytes: int
    arena_bytes: int
    arena_size: int
    num_threads: int
    num_fds: int


def role_of(process: psutil.Process) -> str:
    """What a process is for; else the program that it runs."""
    command, name = process.cmdline(), process.name()
    title = " ".join([*command[:1], name])
    scripts = [Path(argument).stem for argument in command if argument.endswith(".py")]
    if scripts and scripts[0] in _STARTS_OF_WORKERS:
        return "worker"
    return next((role for mark, role in _ROLES if mark in title), scripts[0] if scripts else name)


def take(processes: Iterable[psutil.Process], at_s: float) -> list[Usage]:
    """Read every process that still lives."""
    found = []
    for process in processes:
        with suppress(psutil.Error), process.oneshot():
            memory = process.memory_full_info()
            role, num_threads, num_fds = role_of(process), process.num_threads(), process.num_fds()
            arena = _arena(process.pid)
            found.append(Usage(process.pid, role, at_s, memory.rss, memory.uss, *arena, num_threads, num_fds))
    return found


def _arena(pid: int) -> tuple[int, int]:
    """Bytes written, and the size, of the anonymous files that `kv_transfer.shared_memory` makes."""
    written = size = 0
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if str(file.readlink()).startswith(_ARENA):
                    status = file.stat()
                    written, size = written + status.st_blocks * 512, size + status.st_size
    return written, size
