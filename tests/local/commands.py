"""Runs `app.local` as `make` does, with a folder of its own."""

import subprocess
import sys
from pathlib import Path

import psutil

from app.local_process import RunFolder

ROOT = Path(__file__).parents[2]


def command(folder: RunFolder, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "app.local", "--run-dir", str(folder.path), *arguments]


def run(folder: RunFolder, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
