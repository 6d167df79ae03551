"""Waiting for what comes to be true and tells nobody; other processes, for the most part."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Of no test the matter: a machine that others keep busy may take so long for what else takes milliseconds.
PATIENCE_S = 60.0


def wait_until(
    condition: Callable[[], T | None], timeout_s: float = PATIENCE_S, describe: Callable[[], object] = str
) -> T:
    """What the condition gives once it is true.

    Args:
        condition: is asked again and again.
        timeout_s: after so long the test fails.
        describe: says, then, how things are.
    """
    began_s = time.monotonic()
    while not (found := condition()):
        waited_s = time.monotonic() - began_s
        assert waited_s < timeout_s, f"not true after {timeout_s} s: {describe()}"
        # To ask all replicas 50 times a second takes a core from those that are waited for.
        time.sleep(min(max(0.02, waited_s / 20), 0.2))
    return found


async def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Let the event loop turn until the condition is true; after so long the test fails."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0.001)


def stop_process(pid: int) -> None:
    """Stop a process, and return when no thread of it runs any more.

    The system gives the signal to one thread, which stops the others once it runs itself; until then, and on a busy
    machine that is long, they work and answer.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(state_of(thread) in "TZX" for thread in Path(f"/proc/{pid}/task").iterdir()))


def state_of(thread: Path) -> str:
    """The letter of `proc_pid_stat(5)` for one folder of /proc/PID/task; X for one that has ended."""
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
