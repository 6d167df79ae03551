"""Plots of runs: latency over time, the tail of ITL, goodput against load.

Owns how they look. Pure functions from runs to figures: no pyplot, no backend, nothing global. Knows neither which runs
are worth showing nor where the plots go: `report.py`, which calls these, does.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from load_tests.samples import Run
from load_tests.stats import Slo, goodput

# Told apart by colour-blind people too. Deployments have Okabe and Ito's colours, classes Tol's "muted" ones: one that
# meant both would mislead.
DEPLOYMENT_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
CLASS_COLORS = ("#44AA99", "#882255", "#999933", "#332288", "#88CCEE", "#CC6677")
RUNNING_S = 5.0
# A log axis has no zero, and tokens that came in one packet have gaps of microseconds: no dot lies below this.
LEAST_GAP_MS = 0.1
PERCENTILE_TICKS = (0, 50, 90, 99, 99.9, 99.99, 99.999)

Points = Iterable[tuple[float, float]]


def deployment_colors(runs: Iterable[Run]) -> dict[str, str]:
    """Give each deployment its colour, in the order of their first run; for all plots of one report."""
    return dict(zip(dict.fromkeys(run.deployment for run in runs), cycle(DEPLOYMENT_COLORS), strict=False))


def latency_over_time(runs: Sequence[Run], colors: Mapping[str, str] | None = None) -> Figure:
    """TTFT of each request against when it was sent, over each gap against when it ended.

    Args:
        runs: of one load; the first round of each deployment makes one column.
        colors: of the deployments; None: `deployment_colors(runs)`.
    """
    colors = colors or deployment_colors(runs)
    firsts: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.round):
        firsts.setdefault(run.deployment, run)
    columns = [firsts[name] for name in colors if name in firsts]
    classes = dict.fromkeys(name for run in columns for name in run.classes())
    class_colors = dict(zip(classes, cycle(CLASS_COLORS), strict=False))
    figure = Figure(figsize=(1.0 + 5.2 * len(columns), 7.0), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for axis, label in zip(
        axes[:, 0], ("TTFT (s), by when it was sent", "ITL (ms), by when the gap ended"), strict=True
    ):
        # Before anything is drawn: an axis without data cannot become a log one.
        axis.set(ylabel=label, yscale="log")
        _plain_ticks(axis.yaxis)
    for run, (ttft, itl) in zip(columns, axes.T, strict=True):
        ttft.set_title(_marked(run.deployment, run.is_valid), color=colors[run.deployment], weight="bold")
        itl.set_xlabel("time since the start of the run (s)")
        for name, color in class_colors.items():
            _draw_ttft(ttft, run, name, color)
            _draw_itl(itl, run, name, color)
        for axis in (ttft, itl):
            _shade(axis, run)
            _clean(axis)
    figure.legend(handles=_time_legend(class_colors), loc="outside upper center", ncols=4 * len(columns), frameon=False)
    return figure


def _draw_ttft(axis: Axes, run: Run, request_class: str, color: str) -> None:
    samples = [sample for sample in run.samples if sample.request_class == request_class]
    _dots(axis, [(s.sent_s, s.ttft_s) for s in samples if s.sent_s is not None and s.ttft_s is not None], color, 6)
    starts = [s.sent_s if s.sent_s is not None else s.planned_s for s in samples if s.error is not None]
    failed = [start for start in starts if start is not None]
    # At the upper edge: what failed has no latency.
    edge = axis.get_xaxis_transform()
    axis.plot(failed, [0.97] * len(failed), "x", color=color, markersize=6, transform=edge, scaley=False)


def _draw_itl(axis: Axes, run: Run, request_class: str, color: str) -> None:
    samples = (sample for sample in run.samples if sample.request_class == request_class)
    gaps = [(end, max(gap * 1e3, LEAST_GAP_MS)) for sample in samples for end, gap in sample.gap_ends_s()]
    _dots(axis, gaps, color, 2.5, alpha=0.3)
    stroke = [withStroke(linewidth=4.5, foreground="white")]
    times, values = _running_p99(gaps)
    axis.plot(times, values, color=color, linewidth=2.2, path_effects=stroke, zorder=3)


def _running_p99(gaps: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The p99 of each `RUNNING_S`, at its middle; nan where nothing ended."""
    bins: dict[int, list[float]] = {}
    for end, gap in gaps:
        bins.setdefault(int(end // RUNNING_S), []).append(gap)
    numbers = range(min(bins), max(bins) + 1) if bins else range(0)
    values = [float(np.percentile(bins[number], 99)) if number in bins else float("nan") for number in numbers]
    return [(number + 0.5) * RUNNING_S for number in numbers], values


def _shade(axis: Axes, run: Run) -> None:
    last_s = max((s.end_s for s in run.samples if s.end_s is not None), default=run.end_s)
    for start, end in ((0.0, run.warmup_s), (run.end_s, max(run.end_s, last_s))):
        axis.axvspan(start, end, color="#000000", alpha=0.08, linewidth=0)
    axis.margins(x=0.01, y=0.1)


def _time_legend(class_colors: Mapping[str, str]) -> list[Line2D | Patch]:
    dots = [
        Line2D([], [], marker="o", linestyle="", color=color, label=_plain(name))
        for name, color in class_colors.items()
    ]
    return [
        *dots,
        Line2D([], [], marker="x", linestyle="", color="#444444", label="failed"),
        Line2D([], [], color="#444444", linewidth=2.2, label=f"p99 of each {RUNNING_S:g} s"),
        Patch(color="#000000", alpha=0.08, label="warm-up and drain"),
    ]


def itl_cdf(
    runs: Sequence[Run], request_class: str, slo: Slo | None, colors: Mapping[str, str] | None = None
) -> Figure:
    """Percentiles of a class's ITL in the steady state, all runs of a deployment together, stretched towards the tail.

    The vertical axis is 1 - F on a log scale, upside down and labelled with percentiles: each step up is a tenth of the
    gaps that are left.

    Args:
        runs: of one load.
        request_class: whose gaps.
        slo: its bound is drawn.
        colors: of the deployments; None: `deployment_colors(runs)`.
    """
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    axis = figure.subplots()
    # Limits are set below: a single value has no span that could be found.
    axis.set(xscale="log", yscale="log", autoscale_on=False)
    most = 0
    edges: list[float] = []
    for name, color in (colors or deployment_colors(runs)).items():
        own = [run for run in runs if run.deployment == name]
        gaps = np.sort(np.maximum([gap * 1e3 for run in own for gap in run.gaps_s(request_class)], LEAST_GAP_MS))
        if not len(gaps):
            continue
        p5, p99 = np.percentile(gaps, [5, 99])
        label = f"{_marked(name, all(run.is_valid for run in own))}: p99 {p99:.3g} ms, {len(gaps):,} gaps"
        at_least = 1 - np.arange(len(gaps)) / len(gaps)
        axis.plot(gaps, at_least, color=color, linewidth=2, drawstyle="steps-pre", label=label)
        if len(gaps) >= 100:
            axis.plot([p99], [0.01], "o", color=color, markersize=9, markeredgecolor="white", zorder=3)
        edges += [float(p5), float(gaps[-1])]
        most = max(most, len(gaps))
    if slo is not None:
        bound = slo.itl_s * 1e3
        axis.axvline(bound, color="#444444", linestyle="--", linewidth=1.5, label=f"SLO: {bound:.3g} ms")
        edges.append(bound)
    axis.set_ylim(1.0, 0.7 / max(most, 100))
    _percentile_ticks(axis)
    _plain_ticks(axis.xaxis)
    axis.set_xlim(0.8 * min(edges, default=1.0), 1.2 * max(edges, default=10.0))
    axis.set(xlabel="gap between tokens, ITL (ms)", ylabel="percentile of the gaps")
    axis.set_title(_title(f"ITL of {_plain(request_class)} in the steady state", runs))
    axis.axhline(0.01, color="#444444", linewidth=1, linestyle=":")
    _clean(axis)
    if edges:
        # Outside: curves of stalls run along every edge.
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _percentile_ticks(axis: Axes) -> None:
    axis.yaxis.set_major_locator(FixedLocator([1 - percentile / 100 for percentile in PERCENTILE_TICKS]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda rest, _: f"p{round(100 * (1 - rest), 6):g}"))


def goodput_against_load(runs: Sequence[Run], slo: Slo, colors: Mapping[str, str] | None = None) -> Figure:
    """Requests per second that met the SLO against what was offered: dots are rounds, lines their mean.

    Args:
        runs: of several loads.
        slo: what counts as good.
        colors: of the deployments; None: `deployment_colors(runs)`.
    """
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    axis = figure.subplots()
    loads = sorted({run.load for run in runs})
    offered = [float(np.mean([_offered(run) for run in runs if run.load == load])) for load in loads]
    axis.plot(loads, offered, color="#444444", linestyle="--", linewidth=1.5, label="offered")
    for name, color in (colors or deployment_colors(runs)).items():
        own = [run for run in runs if run.deployment == name]
        points = [(run.load, goodput([run], slo)) for run in own]
        for is_valid, marker, alpha in ((True, "o", 0.4), (False, "x", 1.0)):
            dots = [point for run, point in zip(own, points, strict=True) if run.is_valid == is_valid]
            axis.plot(*_xy(dots), marker, color=color, markersize=8, alpha=alpha)
        means = [(load, float(np.mean([y for x, y in points if x == load]))) for load in sorted({x for x, _ in points})]
        axis.plot(*_xy(means), color=color, linewidth=2.2, label=_plain(name))
    if not all(run.is_valid for run in runs):
        axis.plot([], [], "x", color="#444444", markersize=8, label="invalid run")
    axis.set_xticks(loads, [f"{load:g}\n{rate:.2g}/s" for load, rate in zip(loads, offered, strict=True)])
    axis.set_ylim(bottom=0)
    axis.set(
        xlabel="offered load: multiple of the scenario's rates, requests per second",
        ylabel="goodput (requests per second)",
    )
    axis.set_title("Requests per second that met the SLO")
    _clean(axis)
    axis.legend(loc="upper left", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", dpi=150)


def _offered(run: Run) -> float:
    return len(run.measured()) / run.duration_s


def _dots(axis: Axes, points: Points, color: str, size: float, alpha: float = 0.7) -> None:
    axis.plot(*_xy(points), "o", color=color, markersize=size, alpha=alpha, markeredgewidth=0)


def _xy(points: Points) -> tuple[list[float], list[float]]:
    listed = list(points)
    return [x for x, _ in listed], [y for _, y in listed]


def _plain_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=15))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _clean(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#000000", alpha=0.12, linewidth=0.8)
    axis.set_axisbelow(True)


def _title(text: str, runs: Sequence[Run]) -> str:
    loads = sorted({run.load for run in runs})
    return f"{text}, load {', '.join(f'{load:g}' for load in loads)}"


def _marked(name: str, is_valid: bool) -> str:
    return _plain(name) + ("" if is_valid else " (invalid)")


def _plain(name: str) -> str:
    # Text between dollars would be read as a formula.
    return name.replace("$", r"\$")
