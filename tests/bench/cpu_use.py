"""Who uses the cores while a benchmark measures: the server by role, its client, and everybody else."""

import contextlib
from dataclasses import dataclass

import psutil

from app.local_process import RunFolder


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds so far: of the server and this process by role, and of all else on the machine, steal included."""

    own_s: dict[str, float]
    others_s: float

    @classmethod
    def read(cls, folder: RunFolder) -> "CpuUse":
        """Read it now, of the server that runs from a folder."""
        server = folder.server()
        assert server is not None, "the server is gone"
        own = {"player": _cpu_s(psutil.Process())}
        for process in server.processes():
            with contextlib.suppress(psutil.Error):
                mark = " ".join(process.cmdline()[:1]) + process.name()
                role = f"engine {process.pid}" if "EngineActor" in mark else "the rest"
                own[role] = own.get(role, 0.0) + _cpu_s(process)
        times = psutil.cpu_times()
        all_s = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        return cls(own, all_s - sum(own.values()))

    def cores_since(self, before: "CpuUse", seconds: float) -> dict[str, float]:
        """Mean cores used since then, by role."""
        own = {role: (now_s - before.own_s.get(role, 0.0)) / seconds for role, now_s in self.own_s.items()}
        return own | {"others": (self.others_s - before.others_s) / seconds}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
