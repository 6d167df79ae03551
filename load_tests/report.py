"""The report of a load test: one self-contained page beside its plots, and the same figures as text.

Owns which runs are shown, the rounding, the units and the page. Knows neither how figures are computed (`stats.py`) nor
how plots look (`plots.py`). The load tests call `write_report` and `table` when they are done.
"""

import base64
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from load_tests import plots
from load_tests.samples import Run
from load_tests.stats import PERCENTILES, ClassStats, Slo, Summary, attainment, class_stats, goodput

MISSING = "–"  # noqa: RUF001 - a dash where there is no figure
METRICS = ("TTFT", "ITL", "TPOT", "longest gap", "end to end")


@dataclass(frozen=True, slots=True)
class Group:
    """The runs shown of one deployment at one load, all valid or none; `stats` by class."""

    deployment: str
    load: float
    runs: tuple[Run, ...]
    stats: dict[str, ClassStats]

    @property
    def name(self) -> str:
        return self.deployment if self.runs[0].is_valid else f"{self.deployment} (invalid)"


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot and what a reader who cannot see it is told."""

    file: str
    text: str
    figure: Figure

    def embedded(self, folder: Path) -> str:
        """Its PNG as a data URL."""
        return "data:image/png;base64," + base64.b64encode((folder / self.file).read_bytes()).decode()


def write_report(
    folder: Path, title: str, runs: list[Run], slo: Slo | None, about: dict[str, Any], findings: list[str]
) -> Path:
    """Write `report.html` and its plots.

    Args:
        folder: made if it is not there.
        title: of the page.
        runs: of one scenario; deployments keep the order they have here.
        slo: None: no goodput.
        about: what is needed to reproduce the runs: text, numbers, lists and dicts of these.
        findings: plain sentences for the top of the page.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("runs: none; there is nothing to report")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _plots(runs, slo)
    for plot in drawn:
        plots.save(plot.figure, folder / plot.file)
    groups = group_runs(runs)
    template = _environment().get_template("report.html.jinja")
    page = template.render(
        title=title,
        findings=findings,
        runs=runs,
        num_hidden=len(runs) - len(shown(runs)),
        groups=groups,
        loads=list(dict.fromkeys(group.load for group in groups)),
        percentiles=PERCENTILES,
        units={name: _units(group.stats[name] for group in groups) for name in groups[0].stats},
        slo=slo_in_words(slo) if slo else None,
        good=lambda group, name=None: _good(group, slo, name) if slo else None,
        plots=[(plot, plot.embedded(folder)) for plot in drawn],
        server=_server(groups),
        lags=list(dict.fromkeys(name for run in runs for name in run.generator.lag_s)),
        colors=plots.deployment_colors(runs),
        about=about,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def shown(runs: Sequence[Run]) -> list[Run]:
    """Runs that figures and plots show: invalid ones only where no valid one has their deployment and load."""
    valid = {(run.deployment, run.load) for run in runs if run.is_valid}
    return [run for run in runs if run.is_valid or (run.deployment, run.load) not in valid]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put together the runs that are shown, by load and deployment."""
    groups: dict[tuple[float, str], list[Run]] = {}
    deployments = list(dict.fromkeys(run.deployment for run in runs))
    for run in sorted(shown(runs), key=lambda run: (run.load, deployments.index(run.deployment), run.round)):
        groups.setdefault((run.load, run.deployment), []).append(run)
    classes = _classes(runs)
    return [
        Group(deployment, load, tuple(own), {name: class_stats(own, name) for name in classes})
        for (load, deployment), own in groups.items()
    ]


def slo_in_words(slo: Slo) -> str:
    """Say what a request must keep."""
    ttft = ", ".join(f"{number(bound)} s ({name})" for name, bound in slo.ttft_s.items())
    share = "its mean gap" if slo.itl_quantile is None else f"{100 * slo.itl_quantile:g}% of its gaps"
    return (
        f"A request is good if it finished, its first token came within {ttft}, and {share} between tokens took at "
        f"most {number(slo.itl_s * 1e3)} ms."
    )


def table(runs: Sequence[Run], slo: Slo | None) -> str:
    """Lay out the main figures for a terminal, one line per deployment, load and class."""
    groups = group_runs(runs)
    units = _units(stats for group in groups for stats in group.stats.values())
    columns = (("TTFT", 50), ("TTFT", 99), ("ITL", 50), ("ITL", 99), ("longest gap", 50), ("end to end", 50))
    head = ["deployment", "load", "class", "n", "errors"]
    head += [f"{metric} p{percentile} {units[metric]}" for metric, percentile in columns]
    lines = [head + (["goodput/s"] if slo else [])]
    for group in groups:
        for name, stats in group.stats.items():
            line = [group.name, f"{group.load:g}", name, str(stats.num_requests), errors_in_words(stats)]
            for metric, percentile in columns:
                summary = summaries(stats)[metric]
                line.append(in_unit(summary.percentiles[percentile], units[metric]) if summary else MISSING)
            lines.append(line + ([_good(group, slo, name)[0]] if slo else []))
    return _aligned(lines, left=("deployment", "class", "errors"))


def _aligned(lines: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if name in left else ">" for name in lines[0]]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )


def errors_in_words(stats: ClassStats) -> str:
    """Each kind of failure and how often."""
    return ", ".join(f"{kind} {count}" for kind, count in stats.errors.items()) or MISSING


def summaries(stats: ClassStats) -> dict[str, Summary | None]:
    """Distributions by their names on the page."""
    return dict(zip(METRICS, (stats.ttft, stats.itl, stats.tpot, stats.longest_gap, stats.e2e), strict=True))


def number(value: float) -> str:
    """Three significant digits, whole thousands, no exponent."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def in_unit(seconds: float, unit: str) -> str:
    """Seconds as a number of that unit."""
    return number(seconds * 1e3 if unit == "ms" else seconds)


def _plots(runs: Sequence[Run], slo: Slo | None) -> list[Plot]:
    colors = plots.deployment_colors(runs)
    visible = shown(runs)
    loads = {run.load for run in visible}
    top = [run for run in visible if run.load == max(loads)]
    at = f" at load {max(loads):g}, the highest" if len(loads) > 1 else ""
    drawn = []
    if slo is not None and len(loads) > 1:
        text = "Goodput against offered load; dots are rounds."
        drawn.append(Plot("goodput.png", text, plots.goodput_against_load(visible, slo, colors)))
    for name in _classes(top):
        if any(run.gaps_s(name) for run in top):
            text = f"Percentiles of the gaps between tokens of {name}{at}, all rounds."
            drawn.append(Plot(f"itl-{_file_name(name)}.png", text, plots.itl_cdf(top, name, slo, colors)))
    text = f"TTFT and gaps between tokens over time{at}, first round."
    drawn.append(Plot("latency.png", text, plots.latency_over_time(top, colors)))
    return drawn


def _file_name(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    # Two names must not become one file.
    return plain if plain == name else f"{plain}-{name.encode().hex()}"


def _good(group: Group, slo: Slo, request_class: str | None = None) -> tuple[str, str]:
    """Goodput per second and attainment, as text."""
    share = attainment(group.runs, slo, request_class)
    if share is None:
        return "0", MISSING
    if request_class is None:
        return number(goodput(group.runs, slo)), f"{share:.1%}"
    num_good = share * sum(len(run.measured(request_class)) for run in group.runs)
    return number(num_good / sum(run.duration_s for run in group.runs)), f"{share:.1%}"


def _units(all_stats: Iterable[ClassStats]) -> dict[str, str]:
    """One unit per figure, so that what is compared has the same: s once a median reaches one."""
    medians = dict.fromkeys(METRICS, 0.0)
    for stats in all_stats:
        for metric, summary in summaries(stats).items():
            medians[metric] = max(medians[metric], summary.percentiles[50] if summary else 0.0)
    return {metric: "s" if median >= 1 else "ms" for metric, median in medians.items()}


def _classes(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.classes()))


def _server(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Mean over the runs of each group of every figure that any server gave."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.server)
    return [(name, [_mean(run.server[name] for run in g.runs if name in run.server) for g in groups]) for name in names]


def _mean(values: Iterable[float]) -> str:
    listed = list(values)
    return number(sum(listed) / len(listed)) if listed else MISSING


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, in_unit=in_unit, summaries=summaries, errors=errors_in_words)
    return environment
