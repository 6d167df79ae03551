"""Threads of hand-offs in this process, by the names that the code gives them."""

import ctypes
import threading

_PR_GET_TIMERSLACK = 30  # linux/prctl.h


def kv_threads(kind: str = "") -> list[threading.Thread]:
    """Those alive of one kind, such as `link`; of all by default."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"kv-{kind}")]


def slack_ns() -> int:
    """By how much Linux may lengthen short sleeps of the calling thread."""
    return int(ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0))
