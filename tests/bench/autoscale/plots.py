"""The plot of a run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.bench.autoscale.cluster import POOLS
from tests.bench.autoscale.verdict import Phase
from tests.bench.autoscale.watch import Moment


def save_plot(moments: Sequence[Moment], phases: Sequence[Phase], path: Path) -> None:
    """Write one image: for each pool a row with its nodes, its replicas, and those that are wanted."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    rows = figure.subplots(len(POOLS), 1, sharex=True, sharey=True)
    times = [moment.at_s for moment in moments]
    for pool, row in zip(POOLS, rows, strict=True):
        row.step(times, [moment.nodes[pool] for moment in moments], where="post", label="nodes")
        row.step(times, [moment.replicas[pool] for moment in moments], where="post", label="replicas that serve")
        wanted = [moment.targets[pool] for moment in moments]
        row.step(times, wanted, where="post", color="black", linestyle=":", linewidth=1, label="replicas wanted")
        row.set_title(pool, loc="left")
        row.set_ylim(0, max(max(moment.nodes[name] for name in POOLS) for moment in moments) + 1)
        row.yaxis.get_major_locator().set_params(integer=True)
        begins_s = 0.0
        for number, phase in enumerate(phases):
            row.axvspan(begins_s, begins_s + phase.seconds, color="gray", alpha=0.15 * (number % 2), linewidth=0)
            row.text(begins_s, row.get_ylim()[1], f" {phase.name}", va="top", fontsize="small")
            begins_s += phase.seconds
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize="small")
    rows[-1].set_xlabel("seconds")
    figure.savefig(path)
