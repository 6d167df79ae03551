"""Threads of hand-offs in this process, by the names that the code gives them."""

import threading


def kv_threads(kind: str = "") -> list[threading.Thread]:
    """Those alive of one kind, such as `link`; of all by default."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"kv-{kind}")]
