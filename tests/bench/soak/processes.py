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


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process uses at one time.

    Attributes:
        pid: of the process.
        role: what it is for.
        at_s: when, by the system's monotonic clock.
        rss_bytes: memory that it has mapped and touched, shared memory included.
        uss_bytes: of that, what nobody shares.
        num_threads: its threads.
        num_fds: its open file descriptors.
    """

    pid: int
    role: str
    at_s: float
    rss_bytes: int
    uss_bytes: int
    num_threads: int
    num_fds: int


def role_of(process: psutil.Process) -> str:
    """What a process is for; else the program that it runs."""
    command, name = process.cmdline(), process.name()
    title = " ".join([*command[:1], name])
    scripts = [Path(argument).stem for argument in command if argument.endswith(".py")]
    return next((role for mark, role in _ROLES if mark in title), scripts[0] if scripts else name)


def take(processes: Iterable[psutil.Process], at_s: float) -> list[Usage]:
    """Read every process that still lives."""
    found = []
    for process in processes:
        with suppress(psutil.Error), process.oneshot():
            memory = process.memory_full_info()
            role, num_threads, num_fds = role_of(process), process.num_threads(), process.num_fds()
            found.append(Usage(process.pid, role, at_s, memory.rss, memory.uss, num_threads, num_fds))
    return found
