"""How much of the machine's memory this process may still take, in a container too."""

from pathlib import Path

import psutil

# A container's limit, what it uses, and what of that is cached files which the kernel drops when memory is short:
# cgroup v2 and v1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping: free ones and those of cached files, within the container's limit.

    Args:
        cgroup: where this process sees its control group, as containers do.
    """
    available: int = psutil.virtual_memory().available
    for limit, usage, stat, cached in _CGROUPS:
        try:
            bound = (cgroup / limit).read_text().strip()
            if bound == "max":
                continue
            used = int((cgroup / usage).read_text())
            files = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
            available = min(available, int(bound) - used + int(files.get(cached, 0)))
        except OSError:  # no such control group
            continue
    return max(0, available)
