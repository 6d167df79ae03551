"""How much of the machine's memory this process may take at most, and still, in a container too."""

from collections.abc import Iterator
from pathlib import Path

import psutil

# A container's limit, what it uses, and what of that is cached files which the kernel drops when memory is short:
# cgroup v2 and v1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


_CGROUP = Path("/sys/fs/cgroup")


def total_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that the machine has, or the container may take. Argument as that of `available_memory`."""
    total: int = psutil.virtual_memory().total
    return min([total, *(bound for bound, _ in _bounds(cgroup))])


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that can be taken without swapping: free ones and those of cached files, within the container's limit.

    Args:
        cgroup: where this process sees its control group, as containers do.
    """
    available: int = psutil.virtual_memory().available
    return max(0, min([available, *(bound - used for bound, used in _bounds(cgroup))]))


def _bounds(cgroup: Path) -> Iterator[tuple[int, int]]:
    """Of each version's control group that has one: its limit, and what is used and cannot be dropped."""
    for limit, usage, stat, cached in _CGROUPS:
        try:
            bound = (cgroup / limit).read_text().strip()
            if bound == "max":
                continue
            used = int((cgroup / usage).read_text())
            files = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
            found = int(bound), used - int(files.get(cached, 0))
        except (OSError, ValueError):  # no such control group, or none that says so
            continue
        if found[0] >= 0:
            yield found
