"""What it takes to reproduce a measurement: command, commit, hardware, versions. Read once, put into every report."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("aiperf", "numpy", "matplotlib")


def describe(**more: Any) -> dict[str, Any]:
    """Describe this client machine and this checkout; `more` is added as it is."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{_cpu_name()}, {os.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        **more,
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    family = next((line.partition(":")[2].strip() for line in lines if line.startswith("cpu family")), "?")
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model\t")), "?")
    return f"{name} (family {family}, model {model})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
