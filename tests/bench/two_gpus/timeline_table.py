"""Gaps between an engine's tokens by what the step had in it, from what `timeline.py` has recorded.

Run: `.venv/bin/python -m tests.bench.two_gpus.timeline_table FILE.steps ...`. A gap is from one step that was told to
the next one, counted once per sequence. It is taken apart into the step on the device, the device's pause before it,
copies of chunks that arrived in that pause, and how much later than the step before the host has noticed its end.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.bench.two_gpus.timeline import COLUMNS, SENT, SENT_COLUMNS

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

# The device's clock is compared with the host's within so many steps: the least that a step was noticed late is taken
# for none. Clocks drift by less meanwhile.
_WINDOW = 1000
# A step that was begun so long behind the end of the one before it followed a pause.
_PAUSE_S = 0.002
_LONG_CONTEXT = 4096
_NOTICEABLE_MS = 0.3


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of one engine, in order; milliseconds.

    Attributes:
        columns: of the steps that ended them, by `COLUMNS`.
        gap: from one step's tokens to the next one's.
        late: how long after its end on the device a step was noticed.
        parts: what adds up to the gaps; empty where no device was recorded.
        spans: what the host did for the steps.
    """

    columns: Mapping[str, Floats]
    gap: Floats
    late: Floats
    parts: Mapping[str, Floats]
    spans: Mapping[str, Floats]

    @property
    def weights(self) -> Floats:
        """Sequences that waited."""
        return self.columns["num_seqs"]


def read_rows(path: Path, names: tuple[str, ...]) -> dict[str, Floats]:
    """Columns of a file, without a row that was cut off."""
    values = np.fromfile(path)
    rows = values[: len(values) // len(names) * len(names)].reshape(-1, len(names))
    return dict(zip(names, rows.T, strict=True))


def gaps_of(steps: Mapping[str, Floats], min_seqs: int) -> Gaps:
    """Gaps that ended with steps of at least so many sequences, behind other steps and not behind pauses."""
    late = _lateness(steps)
    told, idle = steps["told_s"] * 1e3, np.nan_to_num(steps["idle_ms"] - steps["import_device_ms"])
    gap, more_late = np.diff(told, prepend=np.nan), np.diff(late, prepend=np.nan)
    begun_behind = steps["begun_s"] - np.roll(steps["concluded_s"], 1)
    is_gap = (begun_behind < _PAUSE_S) & (steps["num_seqs"] >= min_seqs)
    is_gap[:1] = False
    parts = {
        "device": steps["device_ms"],
        "import": steps["import_device_ms"],
        "idle": idle,
        "noticed later": more_late,
    }
    if np.isnan(steps["device_ms"]).all():
        parts = {}
    spans = {
        "between steps": (steps["begun_s"] - np.roll(steps["concluded_s"], 1)) * 1e3,
        "of it imports": steps["import_s"] * 1e3,
        "choosing": (steps["launch_s"] - steps["begun_s"]) * 1e3,
        "launching": (steps["launched_s"] - steps["launch_s"]) * 1e3,
        "waiting": (steps["told_s"] - steps["awaited_s"]) * 1e3,
        "concluding": (steps["concluded_s"] - steps["told_s"]) * 1e3,
    }
    return Gaps(_at(steps, is_gap), gap[is_gap], late[is_gap], _at(parts, is_gap), _at(spans, is_gap))


def _at(columns: Mapping[str, Floats], which: Mask) -> dict[str, Floats]:
    return {name: column[which] for name, column in columns.items()}


def _lateness(steps: Mapping[str, Floats]) -> Floats:
    """Milliseconds from each step's end on the device to its tokens on the host."""
    ended = np.cumsum(np.nan_to_num(steps["idle_ms"]) + steps["device_ms"])
    behind = steps["told_s"] * 1e3 - ended
    for start in range(0, len(behind), _WINDOW):
        behind[start : start + _WINDOW] -= behind[start : start + _WINDOW].min()
    return behind


def kinds_of(gaps: Gaps) -> dict[str, Mask]:
    """Steps by what they had in them; one step may be of several kinds, and not all kinds have steps."""
    columns = gaps.columns
    blocks, rows = columns["num_blocks"], columns["num_rows"]
    is_long, has_prompt = columns["max_context_tokens"] >= _LONG_CONTEXT, columns["num_prompt_tokens"] > 0
    collected = columns["gc_s"] * 1e3 >= _NOTICEABLE_MS
    nothing = (blocks == 0) & (columns["num_activated"] == 0) & ~has_prompt & ~collected
    kinds = {
        "all": np.full(len(rows), True),
        "nothing arrived, all short": nothing & ~is_long,
        "nothing arrived, one is long": nothing & is_long,
        "1 block arrived": blocks == 1,
        "2 to 7 blocks": (blocks >= 2) & (blocks <= 7),
        "8 blocks and more": blocks >= 8,
        "a hand-off was whole": columns["num_activated"] > 0,
        "prompt tokens": has_prompt,
        f"collected garbage, {_NOTICEABLE_MS} ms": collected,
    }
    kinds |= {f"nothing arrived, {int(size)} rows": nothing & (rows == size) for size in np.unique(rows)}
    if gaps.parts:
        kinds[f"device paused, {_NOTICEABLE_MS} ms"] = gaps.parts["idle"] >= _NOTICEABLE_MS
        kinds[f"noticed late, {_NOTICEABLE_MS} ms"] = gaps.late >= _NOTICEABLE_MS
    return kinds


def percentiles(values: Floats, weights: Floats, at: tuple[float, ...]) -> list[float]:
    """Each value counts as often as its weight says."""
    order = np.argsort(values)
    shares = np.cumsum(weights[order])
    found = np.searchsorted(shares, np.array(at) / 100 * shares[-1])
    return [float(value) for value in values[order][np.minimum(found, len(values) - 1)]]


def lines(gaps: Gaps) -> list[str]:
    """The table."""
    slowest = gaps.gap >= percentiles(gaps.gap, gaps.weights, (99,))[0]
    head = f"{'ms, by what the step had in it':34} {'steps':>7} {'share':>6} {'of slowest':>10}"
    text = [head + f" {'p50':>6} {'p95':>6} {'p99':>6}" + "".join(f" {name:>13}" for name in gaps.parts)]
    for name, which in kinds_of(gaps).items():
        if which.any():
            text.append(_line(gaps, name, which, slowest))
    text.append(_line(gaps, "the slowest of a hundred", slowest, slowest))
    text.append(f"\n{'ms of the host':34} {'p50':>6} {'p95':>6} {'p99':>6} {'most':>6}")
    for name, span in [*gaps.spans.items(), *([("noticed behind the device", gaps.late)] if gaps.parts else [])]:
        p50, p95, p99 = np.percentile(span, (50, 95, 99))
        text.append(f"{name:34} {p50:6.2f} {p95:6.2f} {p99:6.2f} {span.max():6.2f}")
    return text


def _line(gaps: Gaps, name: str, which: Mask, slowest: Mask) -> str:
    p50, p95, p99 = percentiles(gaps.gap[which], gaps.weights[which], (50, 95, 99))
    share, of_slowest = which.mean(), (which & slowest).sum() / slowest.sum()
    text = f"{name:34} {which.sum():7} {share:6.1%} {of_slowest:10.0%} {p50:6.2f} {p95:6.2f} {p99:6.2f}"
    return text + "".join(f" {np.mean(part[which]):13.2f}" for part in gaps.parts.values())


def sent_line(path: Path) -> str:
    """How long tokens waited for the thread that sends them."""
    sent = read_rows(path, SENT_COLUMNS)
    p50, p95, p99 = np.percentile((sent["written_s"] - sent["handed_s"]) * 1e3, (50, 95, 99))
    return f"{'from the loop to the socket':34} {p50:6.2f} {p95:6.2f} {p99:6.2f}"


def table_of(path: Path, min_seqs: int = 16) -> list[str]:
    """What one engine has recorded, in lines.

    Args:
        path: of the steps.
        min_seqs: of steps that count: those under load.
    """
    gaps = gaps_of(read_rows(path, COLUMNS), min_seqs)
    head = f"\n{path.name}: {len(gaps.gap)} gaps of at least {min_seqs} sequences; parts are means"
    return [head, *lines(gaps), sent_line(path.with_suffix(SENT))] if len(gaps.gap) else [head]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.two_gpus.timeline_table")
    parser.add_argument("files", nargs="+", type=Path, help="ending with .steps")
    parser.add_argument("--min-seqs", type=int, default=16, help="of steps that count: those under load")
    options = parser.parse_args()
    for path in options.files:
        print("\n".join(table_of(path, options.min_seqs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
