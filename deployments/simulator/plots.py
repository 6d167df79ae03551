"""Plots of plays: replicas over time, and first tokens."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from deployments.simulator.result import Result


def save_plot(results: Mapping[str, Result], path: Path) -> None:
    """Write one image: for each way to scale a row with its replicas, wanted and serving, and its TTFT."""
    figure = Figure(figsize=(11, 2.4 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False, width_ratios=(3, 1))
    for (name, result), (replicas, tail) in zip(results.items(), rows, strict=True):
        for pool, history in result.history.items():
            hours = [at_s / 3600 for at_s, _, _ in history]
            (line,) = replicas.step(hours, [ready for *_, ready in history], where="post", label=pool)
            wanted = [target for _, target, _ in history]
            replicas.step(hours, wanted, where="post", color=line.get_color(), linestyle=":", linewidth=1)
        replicas.set_title(f"{name}: {result.attainment:.1%} good, {result.gpu_hours:.2f} GPU-hours", loc="left")
        replicas.set_ylabel("replicas")
        replicas.legend(loc="upper right", fontsize="small")
        count = max(1, len(result.ttft_s))
        tail.plot(result.ttft_s, [(i + 1) / count for i in range(len(result.ttft_s))])
        tail.set_xscale("log")
        tail.set_xlabel("TTFT, s")
    rows[-1][0].set_xlabel("hours (dotted: wanted)")
    figure.savefig(path)
