"""Processes that must be punctual beside others that keep every core busy.

A load generator on the cores of what it measures wakes up when Linux lets it. Between sessions (`sched_autogroup`) it
is no use to be nicer than another: a sender beside two engines waited for up to two seconds, though it needs a tenth
of a core and Ray's workers have a niceness of 15 (Linux 6.18). A real-time class is served at once.
"""

import os

import psutil


def put_first(process: psutil.Process) -> bool:
    """Have all threads of a process run before those of any that is no real-time process.

    Not those that it starts later, nor its children.

    Returns:
        Whether they do: the system may not allow it, or know no such thing.
    """
    if not hasattr(os, "SCHED_RESET_ON_FORK"):  # not Linux
        return False
    lowest = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
    try:
        for thread in process.threads():
            os.sched_setscheduler(thread.id, os.SCHED_RR | os.SCHED_RESET_ON_FORK, lowest)
    except (OSError, psutil.Error):
        return False
    return True
